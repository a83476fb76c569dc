"""Laws of resuming: an interrupted run ends with the same weights, to the bit, as one that was not interrupted, or an
error says why it cannot."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor

from helpers.paths import HELPERS, ROOT
from helpers.tiny import tiny_llama
from helpers.training import FORGET, HOLDOUT, RETAIN, settings, trained
from hf_unlearn.errors import SettingsError
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.trainer.checkpoints import SEAL, find_checkpoint, read_seal
from hf_unlearn.trainer.trainer import UnlearningTrainer

CASES: dict[str, dict[str, Any]] = {
    "energy, sgd": {"optim": "sgd"},
    "energy, adamw": {"optim": "adamw_torch", "weight_decay": 0.1},
    "kronecker, sgd": {"constraint": "kronecker"},
    "dropout, accumulation": {
        "constraint": "ridge",
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 1,
    },
    "lora": {"constraint": "kronecker"},
    "drift budget": {"constraint": "none", "max_retain_drift": 0.5},
}


def make(folder: Path, case: str, **changes: Any) -> UnlearningTrainer:
    model = tiny_llama(dropout=0.1 if case.startswith("dropout") else 0.0)
    statistics = collect_statistics(model, RETAIN, fisher=True, progress=False)
    own = {"learning_rate": 1e-2, "max_steps": 8, "save_strategy": "steps", "save_steps": 3, **CASES[case], **changes}
    options = {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "up_proj"])} if case == "lora" else {}
    holdout = own.pop("holdout", None)
    args = settings(folder, **own)
    return UnlearningTrainer(model, args, FORGET, statistics=statistics, holdout_dataset=holdout, **options)


def weights(trainer: UnlearningTrainer) -> dict[str, Tensor]:
    return trained(trainer.model)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES)
def test_resuming_gives_the_weights_of_the_uninterrupted_run(case: str, tmp_path: Path) -> None:
    whole = make(tmp_path, case)
    whole.train()
    again = make(tmp_path, case)
    start = weights(again)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.state.global_step == whole.state.global_step == 8
    expected, resumed = weights(whole), weights(again)
    for name in expected:
        assert torch.equal(resumed[name], expected[name]), name
    assert any(not torch.equal(start[name], expected[name]) for name in expected)
    assert again.constrainer.drift().by_layer == whole.constrainer.drift().by_layer  # so the anchors are the same


def test_early_stopping_resumes_between_evaluations(tmp_path: Path) -> None:
    """The steps that are shortened begin before the checkpoint, which therefore stores their start."""
    changes = {"loss": "grad_ascent", "forget_metric": "loss", "eval_strategy": "steps", "eval_steps": 4}
    changes |= {"holdout": HOLDOUT, "max_steps": 20, "learning_rate": 4e-3, "constraint": "none"}
    whole = make(tmp_path, "energy, sgd", **changes)
    whole.train()
    assert "held-out" in whole.stop_reason and whole.state.global_step < 20
    last = max(step for step in range(0, whole.state.global_step, 3) if step % 4)
    again = make(tmp_path, "energy, sgd", **changes)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{last}"))
    assert again.stop_reason == whole.stop_reason
    expected, resumed = weights(whole), weights(again)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_a_run_that_had_ended_is_loaded_as_it_ended(tmp_path: Path) -> None:
    changes = {"loss": "grad_ascent", "forget_metric": "loss", "eval_strategy": "steps", "eval_steps": 2}
    changes |= {"holdout": HOLDOUT, "max_steps": 20, "save_steps": 2, "constraint": "none"}
    whole = make(tmp_path, "energy, sgd", **changes)
    whole.train()
    assert "held-out" in whole.stop_reason
    again = make(tmp_path, "energy, sgd", **changes)
    again.train(resume_from_checkpoint=True)
    assert again.stop_reason == whole.stop_reason and again.state.global_step == whole.state.global_step
    expected, resumed = weights(whole), weights(again)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_an_incomplete_checkpoint_is_never_used(tmp_path: Path) -> None:
    make(tmp_path, "energy, sgd", save_steps=2).train()
    newest = tmp_path / "checkpoint-8"
    assert find_checkpoint(True, tmp_path) == newest
    for damage in ("model.safetensors", "optimizer.pt", SEAL):
        kept = (newest / damage).read_bytes()
        (newest / damage).write_bytes(kept[: len(kept) // 2])
        assert read_seal(newest) is None and find_checkpoint(True, tmp_path) == tmp_path / "checkpoint-6"
        with pytest.raises(SettingsError, match="not a complete checkpoint"):
            find_checkpoint(str(newest), tmp_path)
        (newest / damage).write_bytes(kept)
    (newest / SEAL).unlink()
    assert find_checkpoint(True, tmp_path) == tmp_path / "checkpoint-6"
    assert find_checkpoint(True, tmp_path / "empty") is None and find_checkpoint(None, tmp_path) is None


def test_old_checkpoints_are_removed_only_after_a_newer_one_is_sealed(tmp_path: Path) -> None:
    make(tmp_path, "energy, sgd", save_steps=2, save_total_limit=2).train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    assert all(read_seal(p) is not None for p in tmp_path.glob("checkpoint-*"))
    assert not list(tmp_path.rglob("training_args.bin"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"constraint_settings": {"energy": 0.5}}, "with constraint"),
        ({"momentum": 0.5}, "with optimizer"),
        ({"loss": "npo"}, "with loss"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_in_one_line(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    make(tmp_path, "energy, sgd", max_steps=3).train()
    with pytest.raises(SettingsError, match=message) as raised:
        make(tmp_path, "energy, sgd", **changes).train(resume_from_checkpoint=True)
    assert "\n" not in str(raised.value) and "start again" in str(raised.value)


@pytest.mark.parametrize("changed", ["statistics", "processes"])
def test_other_statistics_or_processes_are_refused(changed: str, tmp_path: Path) -> None:
    trainer = make(tmp_path, "energy, sgd", max_steps=3)
    trainer.train()
    path = tmp_path / "checkpoint-3" / SEAL
    content = json.loads(path.read_text())
    content["run"][changed] = 2 if changed == "processes" else {"weights": "0", "data": "0"}
    path.write_text(json.dumps(content))
    with pytest.raises(SettingsError, match=f"with {changed}"):
        make(tmp_path, "energy, sgd").train(resume_from_checkpoint=True)


def kill_and_finish(folder: Path, kills: int, seed: int) -> tuple[dict[str, Tensor], int]:
    """Start the run repeatedly and kill it after a random time, `kills` times in all; then let it finish."""
    rng, killed = random.Random(seed), 0
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    while not (folder / "end.safetensors").exists():
        process = subprocess.Popen(
            [sys.executable, str(HELPERS / "killed_run.py"), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        if killed < kills:
            if rng.random() < 0.8:
                process.stdout.readline()  # after the imports: in training or saving
                time.sleep(rng.uniform(0.0, 0.6))
            else:
                time.sleep(rng.uniform(2.0, 8.0))
            killed += process.poll() is None
            process.kill()
        assert process.wait(timeout=120) in (0, -9)
    return load_file(folder / "end.safetensors"), killed


def killed_runs(tmp_path: Path, kills: int) -> None:
    """Check runs that are killed at random moments, as many runs as `kills` kills take."""
    (tmp_path / "whole").mkdir()
    wanted, _ = kill_and_finish(tmp_path / "whole", 0, seed=0)
    start = trained(tiny_llama())
    assert any(not torch.equal(start[name], wanted[name]) for name in wanted)
    runs = killed = 0
    while killed < kills:
        folder = tmp_path / f"killed{runs}"
        folder.mkdir()
        weights_at_end, more = kill_and_finish(folder, kills - killed, seed=runs)
        runs, killed = runs + 1, killed + more
        assert all(torch.equal(weights_at_end[name], wanted[name]) for name in wanted)


def test_a_run_killed_three_times_ends_with_the_same_weights(tmp_path: Path) -> None:
    killed_runs(tmp_path, 3)


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_with_the_same_weights(tmp_path: Path) -> None:
    killed_runs(tmp_path, 20)
