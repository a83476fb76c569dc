"""What a constrained step of sharded weights sends: nothing where the constraint acts on whole rows."""

from __future__ import annotations

import json
from typing import Any

import pytest

from helpers.launching import launched_once, start


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> dict[str, Any]:
    folder = launched_once(
        tmp_path_factory, worker_id, "counted", lambda folder: start(2, "count_collectives.py", str(folder))
    )
    return json.loads((folder / "counted.json").read_text())


def test_a_right_hand_factor_on_rows_sends_nothing(counted: dict[str, Any]) -> None:
    assert counted["linear, right"] == {"weights": 14, "total": 0, "counts": {}}


@pytest.mark.parametrize(("case", "round_trips"), [("linear, both", 1), ("conv1d, both", 1), ("conv1d, right", 1)])
def test_the_other_side_takes_one_round_trip_a_weight(case: str, round_trips: int, counted: dict[str, Any]) -> None:
    """For the step; under SGD none for the gradient, even of an anchored one. With gloo an all-to-all is a gather."""
    found = counted[case]
    assert found["total"] == 2 * round_trips * found["weights"]
    assert all("all_gather" in kind or "alltoall" in kind for kind in found["counts"])
