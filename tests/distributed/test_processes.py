"""Several processes find what one finds, however the weights lie on them: statistics, weights, scores, guarantees."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import requires_asset
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor

from hf_unlearn.cli import main
from hf_unlearn.report import UnlearningReport

HERE = Path(__file__).resolve().parent
PLACEMENT = {"ddp": "Whole", "fsdp2": "Rows", "zero1": "Stretches", "zero2": "Stretches", "zero3": "Pieces"}
# Three processes divide neither the rows of the data nor those of most weights.
LAUNCHES = [("ddp", 2), ("ddp", 3), ("fsdp2", 2), ("fsdp2", 3), ("zero1", 2), ("zero2", 3), ("zero3", 2), ("zero3", 3)]
launches = pytest.mark.parametrize(("mode", "processes"), LAUNCHES, ids=[f"{mode} x{n}" for mode, n in LAUNCHES])
RUNS = ("kronecker", "conv1d", "signature", "signature, conv1d", "lora")
Found = tuple[dict[str, Any], dict[str, Tensor]]


def start(processes: int, *line: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    return subprocess.run(
        [sys.executable, *launcher, *line], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Any:
    """What the processes found under a mode; they are started once, when the first test of any worker asks."""
    shared = tmp_path_factory.getbasetemp()
    shared = (shared if worker_id == "master" else shared.parent) / "processes"
    results: dict[tuple[str, int], Found] = {}

    def ask(mode: str, processes: int) -> Found:
        if not _can_run(mode):
            pytest.skip("DeepSpeed is not installed")
        folder = shared / str(processes)
        with FileLock(f"{folder}.lock"):
            modes = [name for name, count in LAUNCHES if count == processes and _can_run(name)] or ["ddp"]
            if not (folder / modes[-1] / "found.json").exists():
                done = start(processes, str(HERE / "program.py"), str(folder), str(processes), *modes)
                assert done.returncode == 0, done.stderr[-3000:]
        if (mode, processes) not in results:
            content = json.loads((folder / mode / "found.json").read_text())
            results[mode, processes] = content, load_file(folder / mode / "found.safetensors")
        return results[mode, processes]

    shared.mkdir(exist_ok=True)
    return ask


def _can_run(mode: str) -> bool:
    return not mode.startswith("zero") or find_spec("deepspeed") is not None


def ddp(test: Any) -> Any:
    return pytest.mark.parametrize("processes", (2, 3))(test)


@launches
def test_so_many_processes_ran_and_the_weights_lie_on_them_as_asked(mode: str, processes: int, found: Any) -> None:
    several, one = found(mode, processes)[0], found("ddp", 1)[0]
    assert several["processes"] == processes and one["processes"] == 1
    for run in RUNS:
        assert several[run]["placements"] == [PLACEMENT[mode]]
        assert several[run]["dtensors"] == (mode == "fsdp2")
        # no process holds more of the original weights than its share; adapters of rank 3 do not divide evenly
        share = 1.0 if mode == "ddp" else 1 / processes
        assert several[run]["held"] == pytest.approx(share, abs=0.15 if mode != "ddp" else 0)


@launches
@pytest.mark.parametrize("run", RUNS)
def test_weights_of_several_processes_are_those_of_one(mode: str, processes: int, run: str, found: Any) -> None:
    (one, single), (two, several) = found("ddp", 1), found(mode, processes)
    names = [name for name in single if name.startswith(f"{run}/")]
    assert names and one[run]["steps"] == two[run]["steps"] == 4
    for name in names:
        assert (several[name] - single[name]).norm() <= 1e-5 * single[name].norm(), name
    assert two[run]["loss"] == pytest.approx(one[run]["loss"], rel=1e-4) and len(two[run]["loss"]) == 13
    assert two[run]["evaluation"] == pytest.approx(one[run]["evaluation"], rel=1e-4)
    if run == "kronecker":
        assert two[run]["evaluation"] == pytest.approx([sum(two[run]["loss"]) / 13], rel=1e-4)
        assert two[run]["drift"] == pytest.approx(one[run]["drift"], rel=1e-3) and one[run]["drift"] > 1e-4
        assert two[run]["kl"] == pytest.approx(one[run]["kl"], rel=1e-2) and one[run]["kl"] > 0
    assert two[run]["back"] < 1e-6  # the original model comes back, whole, for as long as it is asked for


@launches
@pytest.mark.parametrize("run", RUNS)
def test_the_signature_law_holds_on_several_processes(mode: str, processes: int, run: str, found: Any) -> None:
    several = found(mode, processes)[0][run]
    assert several["forget"] > 1e-2
    if "signature" in run or run == "lora":
        assert several["retain"] < 1e-5 * max(1, several["scale"]) and several["drift"] < 1e-6
        assert several["leak"] < 1e-4
    else:  # the control: a soft constraint lets retain logits move
        assert several["retain"] > 1e-3 and several["drift"] > 1e-4


@ddp
def test_statistics_of_several_processes_are_those_of_one(processes: int, found: Any) -> None:
    (one, single), (two, several) = found("ddp", 1), found("ddp", processes)
    assert one["counts"] == two["counts"] and one["data"] == two["data"] and one["counts"][0] == 13
    assert two["same"]
    names = [name for name in single if name.split(".")[0] in ("gram", "one", "values")]
    assert names
    for name in names:
        error = (several[name] - single[name]).norm() / single[name].norm()
        assert error < (1e-12 if name.startswith("one") else 1e-6), name  # other batches: float32 activations differ
    for name in (name for name in single if name.startswith("fisher")):
        torch.testing.assert_close(several[name], single[name], rtol=1e-4, atol=1e-9)
    # a sum over one process's rows alone would be far off
    assert (several[names[0]] / processes - single[names[0]]).norm() > 0.1 * single[names[0]].norm()


@ddp
def test_different_statistics_are_an_error_on_every_process(processes: int, found: Any) -> None:
    refused = found("ddp", processes)[0]["refused"]
    assert refused == f"{processes} processes have 2 different statistics; give all the same"
    assert found("ddp", 1)[0]["refused"] == ""


def test_the_command_launches_itself_and_writes_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, data = requires_asset("stories260K"), requires_asset("tofu/full.json").parent
    common = ["--model_name_or_path", str(model), "--dataset_name", str(data), "--train", "full[0:12]"]
    common += ["--forget", "full[0:4]", "--max_length", "128", "--cache_dir", str(tmp_path / "cache")]
    common += ["--max_steps", "2", "--learning_rate", "5e-3", "--eval_strategy", "no", "--use_cpu", "True"]
    probabilities = []
    for processes in (1, 2):
        out = tmp_path / f"out{processes}"
        own = ["--output_dir", str(out), "--per_device_train_batch_size", str(4 // processes)]
        many = ["--accelerate_config", "ddp", "--num_processes", "2"] if processes == 2 else []
        assert main(["run", *common, *own, *many]) == 0
        report = UnlearningReport.load(out)
        metric = report.get("answer_probability", "forget", "unlearned")
        assert metric is not None and (out / "model.safetensors").is_file()
        probabilities.append(metric.value)
    assert probabilities[1] == pytest.approx(probabilities[0], rel=1e-3)
    assert capfd.readouterr().out.count("answer_probability by split") == 2


def test_fewer_processes_than_asked_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_UNLEARN_PROCESSES", "2")
    assert main(["run"]) == 2
    assert "2 processes were asked for and 1 started" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["fsdp7"], ["nowhere.yaml"], ["ddp", "--num_processes", "0"]], ids=" ".join)
def test_an_unknown_configuration_is_one_line(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--accelerate_config", *flags]) == 2
    assert capsys.readouterr().err.count("\n") == 1
