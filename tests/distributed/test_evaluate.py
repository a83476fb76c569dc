"""Several processes, and weights sharded over them, come to the numbers of one: scores, answers, gradients, attacks."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from helpers.launching import launched_once, start

Found = Callable[[int], dict[str, Any]]
SEVERAL = (2, pytest.param(3, marks=pytest.mark.slow))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Found:
    """What so many processes found; they are started once."""

    def ask(processes: int) -> dict[str, Any]:
        folder = launched_once(
            tmp_path_factory,
            worker_id,
            f"evaluated-{processes}",
            lambda folder: start(processes, "evaluate_rows.py", str(folder), str(processes)),
        )
        return json.loads((folder / "found.json").read_text())

    return ask


def alike(left: list[list[Any]], right: list[list[Any]]) -> None:
    assert [metric[:4] for metric in left] == [metric[:4] for metric in right] and left
    for one, other in zip(left, right, strict=True):
        assert other[4] == pytest.approx(one[4], rel=2e-3, abs=1e-6, nan_ok=True), one[:3]


@pytest.mark.parametrize("processes", SEVERAL)
@pytest.mark.parametrize("what", ["whole", "audit", "content"])
def test_metrics_and_attacks_of_several_processes_are_those_of_one(processes: int, what: str, found: Found) -> None:
    alike(found(1)[what], found(processes)[what])
    if what == "content":
        alike(found(1)[what], found(processes)["sharded content"])
    assert len({round(metric[4], 4) for metric in found(1)[what] if metric[4] == metric[4]}) > 5


@pytest.mark.parametrize("processes", SEVERAL)
def test_a_sharded_model_has_the_metrics_of_the_whole_one(processes: int, found: Found) -> None:
    names = {metric[0] for metric in found(processes)["sharded"]}
    alike([metric for metric in found(1)["whole"] if metric[0] in names], found(processes)["sharded"])


@pytest.mark.parametrize("processes", SEVERAL)
def test_attacks_that_need_whole_gradients_are_refused_on_a_sharded_model(processes: int, found: Found) -> None:
    said = found(processes)["refused"]
    assert len(said) == 2 and all("is sharded over processes" in line for line in said)


@pytest.mark.parametrize("processes", (1, *SEVERAL))
def test_the_cache_is_written_once_and_read_by_all(processes: int, found: Found) -> None:
    assert found(processes)["cached"] == found(processes)["whole"]
    assert found(processes)["files"] == found(1)["files"] > 0
