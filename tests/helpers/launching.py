"""Starting programs of tests/helpers/programs on several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from filelock import FileLock

from helpers.paths import PROGRAMS, ROOT, TESTS

# One thread each; hangs end at the programs' own time limits, which say where they were.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{TESTS}"}


def start(processes: int, program: str, *arguments: str) -> None:
    """Run a program on so many processes, to its successful end."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    line = [sys.executable, *launcher, str(PROGRAMS / program), *arguments]
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def launched_once(factory: pytest.TempPathFactory, worker_id: str, name: str, launch: Callable[[Path], None]) -> Path:
    """The folder that `launch` filled; the test workers share it, so that the same processes never start twice."""
    base = factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / name
    with FileLock(f"{folder}.lock"):
        if not (folder / "launched").exists():
            folder.mkdir()
            launch(folder)
            (folder / "launched").touch()
    return folder


def can_run(mode: str) -> bool:
    return not mode.startswith("zero") or find_spec("deepspeed") is not None
