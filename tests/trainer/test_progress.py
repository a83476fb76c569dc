"""Laws of what a run shows: one readable line a step on standard error, never a dictionary; bars with totals."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PrinterCallback, ProgressCallback

from helpers.tiny import tiny_llama
from helpers.training import FORGET, HOLDOUT, RETAIN, settings
from hf_unlearn.trainer.progress import StepLinesCallback, step_line
from hf_unlearn.trainer.trainer import UnlearningTrainer


def shown(folder: Path, capsys: pytest.CaptureFixture[str], *, quiet: bool, logged: bool = True) -> str:
    args = settings(
        folder,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        logging_strategy="steps" if logged else "no",
        logging_steps=1,
        learning_rate=1e-6,
        disable_tqdm=quiet,
    )
    trainer = UnlearningTrainer(
        tiny_llama(), args, FORGET, RETAIN, holdout_dataset=HOLDOUT, eval_dataset={"retain": RETAIN}
    )
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert kinds.count(StepLinesCallback) == 1 and not {PrinterCallback, ProgressCallback} & set(kinds)
    trainer.train()
    out, err = capsys.readouterr()
    assert out == "" and "{" not in err
    return err


@pytest.mark.parametrize("quiet", [False, True])
def test_each_step_is_one_line(quiet: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    err = shown(tmp_path, capsys, quiet=quiet)
    lines = [part.strip() for line in err.splitlines() for part in line.split("\r") if "step " in part and ": " in part]
    lines = [line[line.index("step ") :] for line in lines if "/3: " in line]
    assert [line.split(":")[0] for line in lines] == ["step 1/3", "step 2/3", "step 3/3"]
    for line in lines:
        assert "loss " in line and "retain drift " in line and "; forget " in line and "; retain " in line
        assert "runtime" not in line and "entropy" not in line and "eval_" not in line
    assert ("Unlearning" in err) == ("|" in err) == (not quiet)


def test_every_bar_has_a_total(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    err = shown(tmp_path, capsys, quiet=False)
    bars = [part for line in err.splitlines() for part in line.split("\r") if "/s]" in part or "it/s" in part]
    assert bars and all("%|" in bar for bar in bars)  # without a total tqdm shows "2it [00:00, 10.68it/s]"


def test_without_train_lines_only_evaluations_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "retain drift" not in (err := shown(tmp_path, capsys, quiet=True, logged=False)) and "; retain " in err


def test_own_metrics_and_small_numbers_are_readable() -> None:
    logs = {"eval_forget_probability": 1.2345e-7, "eval_forget_my_score": 2, "eval_other": "none", "epoch": 1.0}
    assert step_line(logs, ["forget"]) == "forget probability 1.23e-07, my score 2; other none"
    assert step_line({"train_runtime": 3.0, "train_loss": 1.0}, []) == ""  # Trainer's last line; the outcome follows
