"""Starting a command on several processes: `hf-unlearn run ... --accelerate_config fsdp2 --num_processes 2`."""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from hf_unlearn.core.files import read_yaml
from hf_unlearn.errors import SettingsError

ASKED = "HF_UNLEARN_PROCESSES"
_LAUNCHER_FLAGS = ("num_machines", "machine_rank", "main_process_ip", "main_process_port")


def launch(argv: Sequence[str]) -> int:
    """Run an `hf-unlearn` command under `accelerate launch`; its exit code.

    Args:
        argv: Name and flags of the command, and those of the launcher: `--accelerate_config` with the name of a file
            in `recipes/accelerate` or the path of an accelerate configuration, `--num_processes` (of all machines
            together; default what the configuration says) and, for several machines, `--num_machines`,
            `--machine_rank`, `--main_process_ip`, `--main_process_port`.

    Raises:
        SettingsError: No such configuration, or a number of processes that cannot be started.
    """
    parser = argparse.ArgumentParser(prog="hf-unlearn", allow_abbrev=False, add_help=False)
    parser.add_argument("--accelerate_config", required=True)
    for flag in ("num_processes", *_LAUNCHER_FLAGS):
        parser.add_argument(f"--{flag}")
    flags, command = parser.parse_known_args(argv)
    path = _find(flags.accelerate_config)
    content = read_yaml(path)
    asked = {name: getattr(flags, name) for name in _LAUNCHER_FLAGS if getattr(flags, name) is not None}
    machines = _count("num_machines", asked.get("num_machines", content.get("num_machines", 1)))
    count = _count("num_processes", flags.num_processes or content.get("num_processes", 1))
    if count % machines:
        raise SettingsError(
            f"{count} processes cannot be shared out evenly over {machines} machines; choose a multiple"
        )
    if machines == 1:
        asked.setdefault("main_process_port", "0")  # any that is free
    options = [f"--{name}={value}" for name, value in asked.items()]
    line = [
        sys.executable, "-m", "accelerate.commands.launch", f"--config_file={path}", f"--num_processes={count}",
        *options, "-m", "hf_unlearn", *command,
    ]  # fmt: skip
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) * machines // count))}
    return subprocess.run(line, env={**threads, **os.environ, ASKED: str(count)}, check=False).returncode


def check_processes() -> None:
    """Raise `SettingsError` where the launcher started another number of processes than it was asked for.

    `accelerate launch` starts a single one with `--cpu`, or with a configuration of no distributed type, whatever
    `--num_processes` says.
    """
    asked, started = os.environ.get(ASKED) or _asked_of_accelerate(), os.environ.get("WORLD_SIZE", "1")
    if asked is not None and asked != started:
        raise SettingsError(
            f"{asked} processes were asked for and {started} started; check the launcher's settings (accelerate starts "
            "one alone with --cpu or use_cpu: true: leave that out, CPUs are used where there is nothing else)"
        )


def _asked_of_accelerate() -> str | None:
    """What `accelerate launch`, if it is what started this process, was told to start."""
    try:
        parent: Any = psutil.Process().parent()
        line = parent.cmdline() if parent is not None else []
    except psutil.Error:
        return None
    if not any("accelerate" in Path(word).name for word in line[:3]) or "launch" not in " ".join(line[:3]):
        return None
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--num_processes", "--num-processes")
    parser.add_argument("--config_file", "--config-file")
    flags, _ = parser.parse_known_args(line)
    if flags.num_processes is None and flags.config_file is not None:
        return str(read_yaml(Path(flags.config_file)).get("num_processes", 1))
    return flags.num_processes


def _count(name: str, value: Any) -> int:
    if not str(value).isdecimal() or int(value) < 1:
        raise SettingsError(f"{name} must be a whole number of at least 1, got {value!r}")
    return int(value)


def _find(config: str) -> Path:
    given = Path(config)
    if given.suffix in (".yaml", ".yml"):
        if not given.is_file():
            raise SettingsError(f"there is no accelerate configuration {config}")
        return given
    here = Path(__file__).resolve().parent
    folders = [here / "accelerate_configs", here.parents[1] / "recipes" / "accelerate"]
    known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
    if config not in known:
        raise SettingsError(f"unknown accelerate configuration {config!r}; use {', '.join(known)}, or a YAML file")
    return next(folder / f"{config}.yaml" for folder in folders if (folder / f"{config}.yaml").is_file())
