"""Write `public_names.json`, the snapshot of the public surface: `python tests/repo/snapshot_names.py`."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def public_names() -> dict[str, list[str]]:
    """The names of the root and of each room."""
    rooms = sorted(p.parent.name for p in (FOLDER.parents[1] / "hf_unlearn").glob("*/__init__.pyi"))
    packages = ["hf_unlearn", *(f"hf_unlearn.{room}" for room in rooms)]
    return {package: sorted(importlib.import_module(package).__all__) for package in packages}


if __name__ == "__main__":
    text = json.dumps(public_names(), indent=2) + "\n"
    (FOLDER / "public_names.json").write_text(text, encoding="utf-8")
