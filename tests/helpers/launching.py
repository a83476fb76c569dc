"""Starting programs of tests/helpers/programs on several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

from helpers.paths import PROGRAMS, ROOT, TESTS

# One thread each; hangs end at the programs' own time limits, which say where they were.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{TESTS}"}


def start(processes: int, program: str, *arguments: str) -> None:
    """Run a program on so many processes, to its successful end."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    line = [sys.executable, *launcher, str(PROGRAMS / program), *arguments]
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def can_run(mode: str) -> bool:
    return not mode.startswith("zero") or find_spec("deepspeed") is not None
