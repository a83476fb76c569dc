"""Start a command on several processes: `hf-unlearn run ... --accelerate_config fsdp2 --num_processes 2`."""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil

from hf_unlearn.cli.answers import ANSWER_CODE
from hf_unlearn.core.files import read_yaml
from hf_unlearn.core.registry import suggestion
from hf_unlearn.errors import SettingsError

REQUESTED = "HF_UNLEARN_PROCESSES"
"""Environment variable with the number of processes that the launcher was asked for."""
_LAUNCHER_FLAGS = ("num_machines", "machine_rank", "main_process_ip", "main_process_port")


def launch(argv: Sequence[str]) -> int:
    """Run an `hf-unlearn` command under `accelerate launch` and return its exit code.

    Args:
        argv: Name and flags of the command, and the flags of the launcher: `--accelerate_config` with the name of a
            file in `recipes/accelerate` or the path of an accelerate configuration; `--num_processes`, of all machines
            together (default: the configuration's); and, for several machines, `--num_machines`, `--machine_rank`,
            `--main_process_ip`, `--main_process_port`.

    Raises:
        SettingsError: There is no such configuration, or this number of processes cannot be started.
    """
    parser = argparse.ArgumentParser(prog="hf-unlearn", allow_abbrev=False, add_help=False)
    parser.add_argument("--accelerate_config", required=True)
    for flag in ("num_processes", *_LAUNCHER_FLAGS):
        parser.add_argument(f"--{flag}")
    flags, command = parser.parse_known_args(argv)
    path = _find_config(flags.accelerate_config)
    config = read_yaml(path)
    options = {name: value for name in _LAUNCHER_FLAGS if (value := getattr(flags, name)) is not None}
    machines = _positive("num_machines", options.get("num_machines", config.get("num_machines", 1)))
    processes = _positive("num_processes", flags.num_processes or config.get("num_processes", 1))
    if processes % machines:
        raise SettingsError(
            f"{processes} processes cannot be divided evenly over {machines} machines; choose a multiple of {machines}"
        )
    if machines == 1:
        options.setdefault("main_process_port", "0")  # any free port
    line = [sys.executable, "-m", "accelerate.commands.launch", f"--config_file={path}", f"--num_processes={processes}"]
    line += [f"--{name}={value}" for name, value in options.items()]
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) * machines // processes))}
    environment = {**threads, **os.environ, REQUESTED: str(processes)}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "code"
        line += ["-m", "hf_unlearn", *command]
        code = subprocess.run(line, env={**environment, ANSWER_CODE: str(answer)}, check=False).returncode
        return int(answer.read_text(encoding="utf-8")) if answer.is_file() else code


def check_processes() -> None:
    """Raise `SettingsError` if the launcher started another number of processes than was requested.

    `accelerate launch` starts a single process with `--cpu`, or with a configuration without a distributed type, for
    every value of `--num_processes`.
    """
    requested = os.environ.get(REQUESTED) or _requested_of_accelerate()
    started = os.environ.get("WORLD_SIZE", "1")
    if requested is not None and requested != started:
        raise SettingsError(
            f"{requested} processes were requested and {started} started; check the launcher's settings (accelerate "
            "starts a single one with --cpu or use_cpu: true: leave that out, CPUs are used if there is nothing else)"
        )


def _requested_of_accelerate() -> str | None:
    """Return the number of processes on the command line of `accelerate launch`, if that started this process."""
    try:
        parent = psutil.Process().parent()
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


def _positive(name: str, value: object) -> int:
    if not str(value).isdecimal() or int(str(value)) < 1:
        raise SettingsError(f"{name} must be a whole number of at least 1, got {value!r}")
    return int(str(value))


def _find_config(config: str) -> Path:
    """Return the path of an accelerate configuration: a YAML file, or one of the package's by name."""
    path = Path(config)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise SettingsError(f"there is no accelerate configuration {config}; pass an existing YAML file or a name")
        return path
    here = Path(__file__).resolve().parent
    folders = [here / "accelerate_configs", here.parents[1] / "recipes" / "accelerate"]  # installed, and a checkout
    files = {file.stem: file for folder in reversed(folders) for file in folder.glob("*.yaml")}
    if config not in files:
        raise SettingsError(
            f"unknown accelerate configuration {config!r}; {suggestion(config, sorted(files))}, or pass a YAML file"
        )
    return files[config]
