"""Several processes find what one finds, however the weights lie on them: statistics, weights, scores, guarantees."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from torch import Tensor

from helpers.command_lines import FINISHED
from helpers.launching import ENVIRONMENT, can_run, start
from helpers.paths import RECIPES
from helpers.tiny import requires_asset
from hf_unlearn.cli import main
from hf_unlearn.cli.answers import MISSED
from hf_unlearn.evaluation.report import UnlearningReport

PLACEMENT = {
    "ddp": "Replicated",
    "fsdp2": "RowSharded",
    "zero1": "Zero12Fragments",
    "zero2": "Zero12Fragments",
    "zero3": "Zero3Pieces",
}
# Three processes divide neither the rows of the data nor those of most weights.
SLOW_MARK = pytest.mark.slow
FAST = [("ddp", 2), ("fsdp2", 2), ("zero1", 2), ("zero3", 2), ("ddp", 3)]
SLOW = [("fsdp2", 3), ("zero2", 3), ("zero3", 3)]
LAUNCHES = [*FAST, *SLOW]
launches = pytest.mark.parametrize(
    ("mode", "processes"),
    [
        *(pytest.param(mode, n, id=f"{mode} x{n}") for mode, n in FAST),
        *(pytest.param(mode, n, id=f"{mode} x{n}", marks=SLOW_MARK) for mode, n in SLOW),
    ],
)
TWO_SIDED = ("shards", "sketch", "kronecker", "conv1d", "row by row")
RUNS = (*TWO_SIDED, "signature", "signature, conv1d", "lora", "bf16")
Found = tuple[dict[str, Any], dict[str, Tensor]]


@pytest.fixture(scope="session")
def found(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Any:
    """What the processes found under a mode; they are started once, when the first test of any worker asks."""
    shared = tmp_path_factory.getbasetemp()
    shared = (shared if worker_id == "master" else shared.parent) / "processes"
    results: dict[tuple[str, int], Found] = {}

    def ask(mode: str, processes: int) -> Found:
        if not can_run(mode):
            pytest.skip("DeepSpeed is not installed")
        group = SLOW if (mode, processes) in SLOW else FAST
        folder = shared / f"{processes}-{'slow' if group is SLOW else 'fast'}"
        with FileLock(f"{folder}.lock"):
            modes = [name for name, count in group if count == processes and can_run(name)] or ["ddp"]
            if not (folder / modes[-1] / "found.json").exists():
                start(processes, "train.py", str(folder), str(processes), *modes)
        if (mode, processes) not in results:
            content = json.loads((folder / mode / "found.json").read_text())
            results[mode, processes] = content, load_file(folder / mode / "found.safetensors")
        return results[mode, processes]

    shared.mkdir(exist_ok=True)
    return ask


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
    limit, rounding = (1e-5, 1e-4) if run != "bf16" else (1e-2, 5e-2)  # 8 bits, rounded at other places
    if run in TWO_SIDED:
        limit = 1e-4  # a thousandth of a step passes it, and `relative_step` magnifies that, with its rounding
    for name in names:
        assert (several[name].float() - single[name]).norm() <= limit * single[name].norm(), name
    assert two[run]["loss"] == pytest.approx(one[run]["loss"], rel=rounding) and len(two[run]["loss"]) == 13
    assert two[run]["evaluation"] == pytest.approx(one[run]["evaluation"], rel=1e-4)
    if run == "kronecker":
        assert two[run]["evaluation"] == pytest.approx([sum(two[run]["loss"]) / 13], rel=1e-4)
        assert two[run]["drift"] == pytest.approx(one[run]["drift"], rel=1e-3) and one[run]["drift"] > 1e-4
        assert two[run]["kl"] == pytest.approx(one[run]["kl"], rel=1e-2) and one[run]["kl"] > 0
    assert two[run]["back"] < (
        1e-6 if run != "bf16" else 5e-2
    )  # the original model comes back, whole, for as long as it is asked for


@launches
@pytest.mark.parametrize("run", RUNS)
def test_the_signature_law_holds_on_several_processes(mode: str, processes: int, run: str, found: Any) -> None:
    several = found(mode, processes)[0][run]
    assert several["forget"] > 1e-2
    if "signature" in run or run == "lora":
        assert several["retain"] < 1e-5 * max(1, several["scale"]) and several["drift"] < 1e-6
        assert several["leak"] < 1e-4
    elif run == "bf16":  # the weights keep the law; what is computed from them is rounded
        assert several["retain"] < 5e-2 < several["forget"] and several["drift"] < 1e-5 and several["leak"] < 1e-3
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
        torch.testing.assert_close(several[name], single[name], rtol=1e-4, atol=1e-8)
    # a sum over one process's rows alone would be far off
    assert (several[names[0]] / processes - single[names[0]]).norm() > 0.1 * single[names[0]].norm()


KINDS = ("by_row", "shards", "cut", "saved")


@ddp
@pytest.mark.parametrize("kind", KINDS)
def test_collecting_is_exact_however_it_is_shared_out(kind: str, processes: int, found: Any) -> None:
    """The same activations summed by whole Grams or by shards of them, of whole weights or of weights in shards."""
    (one, single), (two, several) = found("ddp", 1), found("ddp", processes)
    names = [name for name in several if name.startswith(f"{kind}.")]
    assert names
    for name in names:
        if "vectors" in name:
            continue
        expected = single[name.replace(kind, "by_row", 1)]
        assert (several[name] - expected).norm() <= 1e-12 * expected.norm(), name
    assert two["same data"] == [True, True] and len(set(two["weights"] + one["weights"])) == 1
    assert two["gradients"] == 0  # a pass leaves none behind, sharded weights or not


@ddp
@pytest.mark.parametrize("kind", ["sketched", "sketched_shards"])
def test_sketches_of_several_processes_are_those_of_one(kind: str, processes: int, found: Any) -> None:
    (_, single), (_, several) = found("ddp", 1), found("ddp", processes)
    names = [name for name in several if name.startswith(f"{kind}.")]
    assert sum(several[name].shape[-1] == 21 for name in names if ".gram." in name) == 2
    assert sum(several[name].shape[-1] == 21 for name in names if ".fisher." in name) == 4
    for name in names:
        expected = single[name.replace(kind, "sketched", 1)]
        assert (several[name] - expected).norm() <= 1e-12 * expected.norm(), name
    assert sum(".missed." in name for name in names) == 2  # decomposed by one process and sent to the others


@ddp
def test_a_sample_ends_at_the_same_batch_everywhere(processes: int, found: Any) -> None:
    rows, different = found("ddp", processes)[0]["sample"]
    assert rows in [processes * 2**power for power in range(1, 6)] and rows < 96 and different == 1


@ddp
def test_no_process_has_more_of_the_grams_than_its_share(processes: int, found: Any) -> None:
    assert found("ddp", 1)[0]["share"] == 1
    assert found("ddp", processes)[0]["share"] == pytest.approx(1 / processes, abs=0.02)
    several = found("ddp", processes)[1]
    for name in (name for name in several if name.startswith("shards.vectors")):
        vectors_II = several[name].double()
        torch.testing.assert_close(vectors_II.T @ vectors_II, torch.eye(len(vectors_II)).double(), atol=1e-5, rtol=0)
    assert all(not several[name].any() for name in several if name.startswith("less."))  # whole ones subtract as well


@ddp
def test_different_statistics_are_an_error_on_every_process(processes: int, found: Any) -> None:
    refused = found("ddp", processes)[0]["refused"]
    assert refused == f"{processes} processes have 2 different statistics; pass the same to all"
    assert found("ddp", 1)[0]["refused"] == ""


def tiny_request(tmp_path: Path, out: str, batch: int) -> list[str]:
    model, data = requires_asset("stories260K"), requires_asset("tofu/full.json").parent
    return [
        "--model_name_or_path",
        str(model),
        "--dataset_name",
        str(data),
        "--train",
        "full[0:12]",
        "--forget",
        "full[0:4]",
        "--max_length",
        "128",
        "--cache_dir",
        str(tmp_path / "cache"),
        "--max_steps",
        "2",
        "--learning_rate",
        "5e-3",
        "--eval_strategy",
        "no",
        "--per_device_train_batch_size",
        str(batch),
        "--output_dir",
        str(tmp_path / out),
    ]


def forgotten(folder: Path) -> float:
    metric = UnlearningReport.load(folder).get("answer_probability", "forget", "unlearned")
    assert metric is not None and (folder / "model.safetensors").is_file()
    return metric.value


@pytest.mark.parametrize(
    "config", ["ddp", pytest.param("fsdp2", marks=SLOW_MARK), pytest.param("zero2", marks=SLOW_MARK), "zero3"]
)
def test_the_command_launches_itself_and_writes_once(
    config: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if not can_run(config):
        pytest.skip("DeepSpeed is not installed")
    mark = ["--forget_target", "1e-9"]  # out of reach: the exit code says so, through a launcher too
    assert main(["run", *tiny_request(tmp_path, "one", 4), *mark, "--use_cpu", "True"]) == MISSED
    many = [*mark, "--accelerate_config", config, "--num_processes", "2"]
    assert main(["run", *tiny_request(tmp_path, "two", 2), *many]) == MISSED
    assert forgotten(tmp_path / "two") == pytest.approx(forgotten(tmp_path / "one"), rel=1e-3)
    assert capfd.readouterr().out.count("answer_probability by split") == 2


@pytest.mark.parametrize(
    "launcher",
    [pytest.param("accelerate", marks=SLOW_MARK), pytest.param("torchrun", marks=SLOW_MARK), "two nodes"],
)
def test_other_launchers_and_two_nodes_do_the_same(launcher: str, tmp_path: Path) -> None:
    request = tiny_request(tmp_path, "two", 2)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script, python = str(RECIPES / "unlearn.py"), sys.executable
    if launcher == "accelerate":
        config = f"--config_file={RECIPES / 'accelerate' / 'fsdp2.yaml'}"
        lines = [[python, "-m", "accelerate.commands.launch", config, "--main_process_port", port, script, *request]]
    elif launcher == "torchrun":
        lines = [[python, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, *request]]
    else:  # a launcher on each node; here they share one machine, and meet over the loopback interface
        node = ["-m", "hf_unlearn", "run", *request, "--accelerate_config", "ddp_two_nodes", "--num_processes", "2"]
        lines = [[python, *node, "--machine_rank", str(rank), "--main_process_port", port] for rank in range(2)]
    started = [subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) for line in lines]
    outputs = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0] * len(lines)
    assert sum(output.count("answer_probability by split") for output in outputs) == 1
    assert main(["run", *tiny_request(tmp_path, "one", 4), "--use_cpu", "True"]) in FINISHED
    assert forgotten(tmp_path / "two") == pytest.approx(forgotten(tmp_path / "one"), rel=1e-3)


def test_fewer_processes_than_asked_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_UNLEARN_PROCESSES", "2")
    assert main(["run"]) == 2
    assert "2 processes were requested and 1 started" in capsys.readouterr().err


def test_a_silent_single_process_of_accelerate_is_an_error() -> None:
    """`accelerate launch --cpu` starts one process, whatever number it is given."""
    line = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", "-m", "hf_unlearn", "run"]
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0 and "2 processes were requested and 1 started" in done.stderr


@pytest.mark.parametrize(
    "flags",
    [
        ["fsdp7"],
        ["nowhere.yaml"],
        ["ddp", "--num_processes", "0"],
        ["ddp_two_nodes", "--num_processes", "3"],
        ["ddp", "--max_steps", "many"],  # a flag of the command, seen before the processes start
        ["ddp", "--max_stepps", "2"],
    ],
    ids=" ".join,
)
def test_an_unknown_configuration_is_one_line(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--accelerate_config", *flags]) == 2
    assert capsys.readouterr().err.count("\n") == 1
