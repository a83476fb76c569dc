"""Command lines of `hf-unlearn` for tests, and what a refused and an answering command print."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hf_unlearn.cli import main


def run_line(places: Mapping[str, str], out: Path, **changes: str) -> list[str]:
    """Return a `run` command line that is right except for `changes`."""
    flags = {
        "model_name_or_path": places["model"],
        "dataset_name": places["data"],
        "train": "full[0:6]",
        "forget": "full[0:2]",
        "holdout": "full[6:9]",
        "output_dir": str(out / "out"),
        "cache_dir": str(out / "cache"),
        "max_steps": "1",
        "use_cpu": "True",
        "disable_tqdm": "True",
    } | changes
    return ["run", *(word for name, value in flags.items() for word in (f"--{name}", value))]


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line on standard error of a command that exits with 2 and prints nothing else."""
    capsys.readouterr()
    assert main(argv) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("hf-unlearn: "), captured.err
    assert "Traceback" not in captured.err and not captured.out
    return lines[0]


FINISHED = (0, 4, 5)
"""Exit codes of a run that has written its folder, whatever its outcome: few steps reach no mark."""


def answered(argv: list[str], capsys: pytest.CaptureFixture[str], code: int | None = None) -> Any:
    """Return the one JSON document on standard output of a command that exits with `code`; default: that is done."""
    capsys.readouterr()
    codes = (code,) if code is not None else FINISHED if argv[0] == "run" else (0,)
    assert main([*argv, "--json"]) in codes
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)
