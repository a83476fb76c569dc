"""Requests in a row on sharded weights: the ledger knows the weights that were written, and the next request, whatever
it runs on, goes on from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.command_lines import FINISHED
from helpers.commands import PEOPLE, said, tiny_model
from helpers.launching import can_run
from hf_unlearn.cli import main


@pytest.mark.parametrize("config", [pytest.param("fsdp2", marks=pytest.mark.slow), "zero3"])
def test_a_sharded_request_is_followed_by_a_whole_one(config: str, tmp_path: Path) -> None:
    """With tied weights, which gathering would count twice."""
    if not can_run(config):
        pytest.skip("DeepSpeed is not installed")
    (tmp_path / "key").write_bytes(bytes(range(32)))
    ledger = ["--ledger", str(tmp_path / "ledger"), "--ledger_key_file", str(tmp_path / "key")]
    run = ["run", *ledger, "--model_name_or_path", str(tiny_model(tmp_path / "model", tied=True)), "--max_steps", "2"]
    run += ["--dataset_name", str(PEOPLE), "--train", "people[0:8]", "--cache_dir", str(tmp_path / "cache")]
    run += ["--disable_tqdm", "True"]
    first = ["--forget", "people[0:2]", "--output_dir", str(tmp_path / "first")]
    assert main([*run, *first, "--accelerate_config", config, "--num_processes", "2"]) in FINISHED
    second = ["--forget", "people[2:4]", "--output_dir", str(tmp_path / "second"), "--use_cpu", "True"]
    assert said([*run, *second])["reports"]["energy_ridge"]["request"]["number"] == 2
    entries = said(["ledger", "show", *ledger])["entries"]
    before, after = (entries[number]["content"]["weights"] for number in (1, 2))
    assert before["after"] == after["before"] != before["before"]
