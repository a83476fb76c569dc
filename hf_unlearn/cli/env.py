"""`hf-unlearn env`: versions and devices for a bug report, without names of folders, users or machines."""

import os
import platform
from argparse import ArgumentParser
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from hf_unlearn import __version__
from hf_unlearn.cli.answers import Answer
from hf_unlearn.cli.parsers import make_parser

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "peft",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "scikit-learn",
    "deepspeed",
    "bitsandbytes",
)


def parser() -> ArgumentParser:
    return make_parser("env", "Print versions and devices, for bug reports.", usage="[--json]")


def main(argv: list[str]) -> Answer:
    parser().parse_args(argv)
    import torch

    facts: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    facts |= {"hf-unlearn": __version__, **{name: _version(name) for name in PACKAGES}}
    facts |= {"cpu cores": os.cpu_count(), "torch threads": torch.get_num_threads(), "cuda": torch.version.cuda}
    facts["devices"] = [_device(index) for index in range(torch.cuda.device_count())]
    facts["mps"] = torch.backends.mps.is_available()
    lines = [
        f"- {name}: {', '.join(fact) or 'none' if isinstance(fact, list) else fact}" for name, fact in facts.items()
    ]
    return Answer("\n".join(lines), facts)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _device(index: int) -> str:
    import torch

    device = torch.cuda.get_device_properties(index)
    return f"{device.name}, {device.total_memory / 2**30:.0f} GiB, capability {device.major}.{device.minor}"
