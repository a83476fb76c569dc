"""What a result was computed with: package versions and hardware."""

from importlib.metadata import PackageNotFoundError, version

import torch

_PACKAGES = ("hf-unlearn", "torch", "transformers", "datasets", "accelerate", "peft")


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that a result depends on."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> str:
    """One line on what a measurement ran on, for reports."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"CPU, {torch.get_num_threads()} threads"
