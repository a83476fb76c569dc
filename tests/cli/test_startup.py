"""Laws of start-up: a help text loads no library that only a running command needs.

Times depend on the machine; the loaded modules do not.
"""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from hf_unlearn.cli import COMMANDS

HEAVY = {
    "bitsandbytes",
    "datasets",
    "deepspeed",
    "evaluate",
    "matplotlib",
    "nltk",
    "peft",
    "rouge_score",
    "scipy",
    "sklearn",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "transformers.modeling_utils",
    "transformers.trainer",
}
"""Modules that take long to import, and that no parser needs."""


def loaded_by(code: str) -> set[str]:
    """Return the modules that a new process has loaded after `code`."""
    end = "\nimport sys, json\nprint(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code + end], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return set(json.loads(done.stderr.splitlines()[-1]))


def help_of(*commands: str) -> str:
    """Return code that prints help texts as the console script does."""
    lines = ["import sys", "from hf_unlearn.cli import main"]
    for command in commands:
        lines += [f"sys.argv = ['hf-unlearn', *{command.split()!r}, '--help']", "assert main() == 0"]
    return "\n".join(lines)


def test_the_general_help_loads_neither_torch_nor_transformers() -> None:
    assert not {"torch", "transformers", "numpy"} & loaded_by(help_of(""))


def test_help_of_run_loads_no_heavy_module() -> None:
    assert not HEAVY & loaded_by(help_of("run"))


def test_help_of_every_command_loads_no_heavy_module() -> None:
    assert not HEAVY & loaded_by(help_of(*COMMANDS))


@pytest.mark.parametrize("module", ["hf_unlearn.deletion.run"])
def test_the_modules_that_work_load_them(module: str) -> None:
    """Negative control: what a command imports once it works."""
    loaded = loaded_by(f"import {module}")
    assert {"datasets", "matplotlib", "peft", "sklearn", "transformers.trainer", "torch._dynamo"} <= loaded
