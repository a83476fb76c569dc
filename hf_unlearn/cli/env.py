"""`hf-unlearn env`: what a bug report needs; no name of a folder, user or machine is in it."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from transformers import HfArgumentParser

from hf_unlearn.cli.common import Answer, make_parser

PACKAGES = (
    "hf-unlearn", "torch", "transformers", "accelerate", "datasets", "peft", "safetensors", "huggingface_hub", "numpy",
    "scikit-learn", "deepspeed", "bitsandbytes",
)  # fmt: skip


def parser() -> HfArgumentParser:
    return make_parser("env", "Print versions and devices, for bug reports.", usage="[--json]")


def main(argv: list[str]) -> Answer:
    parser().parse_args(argv)
    found: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    found |= {name: _version(name) for name in PACKAGES}
    found |= {"cpu cores": os.cpu_count(), "torch threads": torch.get_num_threads(), "cuda": torch.version.cuda}
    found["devices"] = [_device(index) for index in range(torch.cuda.device_count())]
    found["mps"] = torch.backends.mps.is_available()
    lines = [f"- {name}: {', '.join(v) or 'none' if isinstance(v, list) else v}" for name, v in found.items()]
    return Answer("\n".join(lines), found)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _device(index: int) -> str:
    about = torch.cuda.get_device_properties(index)
    return f"{about.name}, {about.total_memory / 2**30:.0f} GiB, capability {about.major}.{about.minor}"
