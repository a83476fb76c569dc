"""Losses, a dual weight, outputs on disk and streams give on two processes what they give on one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from helpers.launching import launched_once, start
from helpers.programs.losses import RUNS


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
    results = []
    for processes in (1, 2):
        folder = launched_once(
            tmp_path_factory,
            worker_id,
            f"losses-{processes}",
            lambda folder, processes=processes: start(processes, "losses.py", str(folder), str(processes)),
        )
        results.append((json.loads((folder / "found.json").read_text()), load_file(folder / "found.safetensors")))
    return results


@pytest.mark.parametrize("loss", RUNS)
def test_a_loss_on_two_processes_is_that_of_one(loss: str, found: Any) -> None:
    (one, single), (two, double) = found
    assert two[loss]["losses"] == pytest.approx(one[loss]["losses"], rel=1e-4) and len(two[loss]["losses"]) == 3
    names = [name for name in single if name.startswith(f"{loss}.")]
    assert names and all((double[name] - single[name]).norm() <= 1e-4 * single[name].norm() for name in names)
    other = next(name for name in RUNS if name != loss)
    moved = [
        (single[name] - single[name.replace(loss, other, 1)]).norm() > 1e-3 * single[name].norm() for name in names
    ]
    assert any(moved)  # another loss would show
    if loss == "pdu":
        assert two[loss]["weight"] == pytest.approx(one[loss]["weight"], rel=1e-4) and one[loss]["weight"] > 2.5


def test_a_stream_is_shared_out(found: Any) -> None:
    (one, single), (two, double) = found
    assert one["stream"] == two["stream"] and one["stream"]["rows"] == 5
    names = [name for name in single if name.startswith("stream.")]  # forward passes of other batches round otherwise
    assert names and all((double[name] - single[name]).norm() <= 1e-5 * single[name].norm() for name in names)
