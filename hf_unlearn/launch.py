"""Starting a command on several processes: `hf-unlearn run ... --accelerate_config ddp --num_processes 2`."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from hf_unlearn.errors import SettingsError
from hf_unlearn.files import read_yaml

ASKED = "HF_UNLEARN_PROCESSES"


def launch(config: str, processes: int | None, command: Sequence[str]) -> int:
    """Run `hf-unlearn COMMAND` under `accelerate launch`, or torchrun where there is no accelerator; its exit code.

    Args:
        config: Name of a file in `recipes/accelerate` (ddp), or path of an accelerate configuration.
        processes: How many to start; default what the configuration says.
        command: Name and flags of the command.

    Raises:
        SettingsError: No such configuration, or no number of processes.
    """
    path = _find(config)
    content = read_yaml(path)
    count = content.get("num_processes", 1) if processes is None else processes
    if not isinstance(count, int) or count < 1:
        raise SettingsError(f"num_processes must be a whole number of at least 1, got {count!r}")
    if content.get("use_cpu") or not torch.cuda.is_available():
        # accelerate starts a single process on a machine without accelerators, whatever it is asked for
        start = ["torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    else:
        start = ["accelerate.commands.launch", f"--config_file={path}", f"--num_processes={count}"]
    line = [sys.executable, "-m", *start, "-m", "hf_unlearn", *command]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count))}
    return subprocess.run(line, env={**threads, **os.environ, ASKED: str(count)}, check=False).returncode


def check_processes() -> None:
    """Raise `SettingsError` where the launcher started another number of processes than `launch` asked for."""
    asked, started = os.environ.get(ASKED), os.environ.get("WORLD_SIZE", "1")
    if asked is not None and asked != started:
        raise SettingsError(f"{asked} processes were asked for and {started} started; check the launcher's settings")


def _find(config: str) -> Path:
    given = Path(config)
    if given.suffix in (".yaml", ".yml"):
        if not given.is_file():
            raise SettingsError(f"there is no accelerate configuration {config}")
        return given
    here = Path(__file__).resolve().parent
    folders = [here / "accelerate_configs", here.parent / "recipes" / "accelerate"]
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    if config not in known:
        raise SettingsError(f"unknown accelerate configuration {config!r}; use {', '.join(known)}, or a YAML file")
    return next(folder / f"{config}.yaml" for folder in folders if (folder / f"{config}.yaml").is_file())
