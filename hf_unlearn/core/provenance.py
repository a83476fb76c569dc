"""What a result was computed with: package versions and hardware."""

from importlib.metadata import PackageNotFoundError, version

import torch

_PACKAGES = ("hf-unlearn", "torch", "transformers", "datasets", "accelerate", "peft")


def package_versions() -> dict[str, str]:
    """Return the installed versions of the packages that a result depends on."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def hardware() -> str:
    """Return one line about what a measurement ran on, for reports."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"CPU, {torch.get_num_threads()} threads"
