"""Laws of training against an attacker, and of stopping row by row, on two processes: one model comes of it; sharded
ones are refused where there is an attacker."""

from __future__ import annotations

import json
from pathlib import Path

from helpers.launching import start


def test_two_processes_with_attackers_of_their_own_end_in_one_model(tmp_path: Path) -> None:
    start(2, "adversary.py", str(tmp_path))
    found = json.loads((tmp_path / "attacked.json").read_text())
    assert found["processes"] == 2 and len(found["weights"]) == 2
    assert found["weights"][0] == found["weights"][1] != found["before"]
    first, second = (log["eval_forget_relearned_probability"] for log in found["judged"])
    assert first == second
    assert found["held"][0] == found["held"][1] != found["before"] and found["pulled"] == sorted(found["pulled"])
    for name in ("both", "one", "none"):
        assert found[name][0] == found[name][1] and (found[name][0] == found["before"]) == (name == "none"), name
    assert found["both"] != found["one"]
    assert "adversary_steps needs whole weights on each process" in found["sharded"]
