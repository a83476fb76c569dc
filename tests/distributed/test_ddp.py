"""Several processes find what one finds: the same statistics, weights and scores; no row counts twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import requires_asset
from safetensors.torch import load_file
from torch import Tensor

from hf_unlearn.cli import main
from hf_unlearn.report import UnlearningReport

HERE = Path(__file__).resolve().parent
SEVERAL = (2, 3)
several = pytest.mark.parametrize("processes", SEVERAL)


def start(processes: int, *line: str) -> subprocess.CompletedProcess[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    return subprocess.run(
        [sys.executable, *launcher, *line], env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[dict[str, Any], dict[str, Tensor]]]:
    results = {}
    for processes in (1, *SEVERAL):
        folder = tmp_path_factory.mktemp(f"processes{processes}")
        done = start(processes, str(HERE / "ddp.py"), str(folder), str(processes))
        assert done.returncode == 0, done.stderr[-3000:]
        results[processes] = (json.loads((folder / "found.json").read_text()), load_file(folder / "found.safetensors"))
    return results


@several
def test_so_many_processes_ran(processes: int, found: Any) -> None:
    assert found[1][0]["processes"] == 1 and found[processes][0]["processes"] == processes
    assert found[processes][0]["same"]  # all processes hold the same weights


@several
def test_statistics_of_several_processes_are_those_of_one(processes: int, found: Any) -> None:
    (one, single), (two, double) = found[1], found[processes]
    assert one["counts"] == two["counts"] and one["data"] == two["data"] and one["counts"][0] == 7
    names = [name for name in single if name.split(".")[0] in ("gram", "one", "values")]
    assert names
    for name in names:
        torch.testing.assert_close(double[name], single[name], rtol=1e-6, atol=1e-9)
    for name in (name for name in single if name.startswith("fisher")):
        torch.testing.assert_close(double[name], single[name], rtol=1e-4, atol=1e-9)
    # a sum over one process's rows alone would be far off
    assert (double[names[0]] / processes - single[names[0]]).norm() > 0.1 * single[names[0]].norm()


@several
def test_weights_scores_and_evaluations_of_several_processes_are_those_of_one(processes: int, found: Any) -> None:
    (one, single), (two, double) = found[1], found[processes]
    assert one["steps"] == two["steps"] == 4
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-4) and len(two["loss"]) == 7
    assert two["evaluation"] == pytest.approx(one["evaluation"], rel=1e-4)
    assert two["evaluation"] == pytest.approx(sum(two["loss"]) / 7, rel=1e-4)
    assert two["drift"] == pytest.approx(one["drift"], rel=1e-3) and one["drift"] > 0
    for name in (name for name in single if name.startswith("weight")):
        assert (double[name] - single[name]).norm() <= 1e-5 * single[name].norm(), name


@several
def test_different_statistics_are_an_error_on_every_process(processes: int, found: Any) -> None:
    assert found[processes][0]["refused"] == f"{processes} processes have 2 different statistics; give all the same"
    assert found[1][0]["refused"] == ""


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
