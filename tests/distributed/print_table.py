"""Markdown table of how far several processes end from one.

    PYTHONPATH=tests python tests/distributed/print_table.py FOLDER

Starts the runs of `helpers/programs/train.py` on one, two and three processes (some minutes) and compares.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from test_processes import LAUNCHES, RUNS

from helpers.launching import can_run, start


def main(folder: Path) -> None:
    for processes in (1, 2, 3):
        modes = [mode for mode, count in LAUNCHES if count == processes and can_run(mode)] or ["ddp"]
        start(processes, "train.py", str(folder / str(processes)), str(processes), *modes)
    single = load_file(folder / "1" / "ddp" / "found.safetensors")
    print(f"| launch | weights lie as | {' | '.join(RUNS)} | largest change of a retain logit (signature) |")
    print("|---|---" + "|---:" * (len(RUNS) + 1) + "|")
    for mode, processes in LAUNCHES:
        place = folder / str(processes) / mode
        if place.is_dir():
            found, several = json.loads((place / "found.json").read_text()), load_file(place / "found.safetensors")
            cells = [f"{farthest(single, several, run):.1e}" for run in RUNS]
            placement, retain = found["signature"]["placements"][0], found["signature"]["retain"]
            print(f"| {mode} x{processes} | {placement} | {' | '.join(cells)} | {retain:.1e} |")


def farthest(single: dict[str, torch.Tensor], several: dict[str, torch.Tensor], run: str) -> float:
    """Largest relative difference of any weight."""
    names = [name for name in single if name.startswith(f"{run}/") and single[name].any()]
    return max(((several[n].float() - single[n]).norm() / single[n].norm()).item() for n in names)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
