"""Checkpoints of several processes, whole and sharded: resumed to the bit, refused where the launch differs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.launching import can_run, launched_once, start
from helpers.programs.resume import make
from hf_unlearn.errors import SettingsError

MODES = [mode for mode in ("ddp", "fsdp2", "zero3") if can_run(mode)]
CASES = ("kronecker", "adamw", "stopping")


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> tuple[Path, dict[str, Any]]:
    folder = launched_once(
        tmp_path_factory, worker_id, "resumed", lambda folder: start(2, "resume.py", str(folder), "2", *MODES)
    )
    return folder, {mode: json.loads((folder / f"{mode}.json").read_text()) for mode in MODES}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("case", CASES)
def test_resuming_gives_the_weights_of_the_uninterrupted_run(mode: str, case: str, resumed: Any) -> None:
    found = resumed[1][mode][case]
    assert found["equal"] == [True, True] and found["moved"]
    assert found["steps"][0] == found["steps"][1] > found["checkpoint"]
    assert found["reasons"][0] == found["reasons"][1] and ("held-out" in found["reasons"][0]) == (case == "stopping")
    assert found["drift"][0] == found["drift"][1] > 0  # the anchors are the same


def test_checkpoints_of_sharded_runs_are_sharded(resumed: Any) -> None:
    files = resumed[1]["fsdp2"]["stopping"]["files"]
    assert "pytorch_model_fsdp_0" in files and "model.safetensors" not in files
    assert {"0-previous.safetensors", "1-previous.safetensors"} <= set(files)


@pytest.mark.parametrize("mode", MODES)
def test_another_number_of_processes_or_sharding_is_refused(mode: str, resumed: Any, tmp_path: Path) -> None:
    trainer = make(tmp_path, "ddp", 1, "adamw")
    checkpoint = resumed[0] / mode / "adamw" / "checkpoint-3"
    with pytest.raises(SettingsError, match="with processes 2, this one has 1") as raised:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert "\n" not in str(raised.value) and "start again" in str(raised.value)
    seal = checkpoint / "unlearning_state.json"
    content = json.loads(seal.read_text())
    content["run"]["processes"] = 1
    seal.write_text(json.dumps(content))
    if mode == "ddp":  # the control: nothing else differs
        trainer.train(resume_from_checkpoint=str(checkpoint))
        return
    with pytest.raises(SettingsError, match=f"with sharding '{mode}', this one has 'none'"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
