"""How far apart models are that were retrained with different seeds: no unlearned model can be asked to be nearer.

    python recipes/floor.py outputs/default/minilm_sst2

The folder is the output of `hf-unlearn benchmark` on a classifier over several seeds; its retrained models saw the same
rows. It prints the average gap (mean difference of forget, retain and held-out accuracy and MIA-efficacy) of each pair.
"""

import argparse
import sys
from itertools import combinations
from pathlib import Path

from hf_unlearn.benchmark.grid import CELLS_FOLDER
from hf_unlearn.errors import OutputError
from hf_unlearn.evaluation.report import UnlearningReport

MEASURED = (
    ("accuracy", "forget"), ("accuracy", "retain"), ("accuracy", "holdout"), ("membership_efficacy", "forget")
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    try:
        gaps = pairs(args.folder)
    except OutputError as error:
        print(f"floor.py: {error}", file=sys.stderr)
        return 2
    for (one, other), gap in gaps.items():
        print(f"seeds {one} and {other}: {gap:.4f}")
    print(f"mean: {sum(gaps.values()) / len(gaps):.4f}")
    return 0


def pairs(folder: Path) -> dict[tuple[str, str], float]:
    """The average gap of every pair of seeds; raises `OutputError` where fewer than two have a retrained model."""
    found: dict[str, list[float]] = {}
    for path in sorted((folder / CELLS_FOLDER).glob("*.json")):
        report = UnlearningReport.load(path)
        metrics = [report.get(name, split, "retrained") for name, split in MEASURED]
        if all(metrics):
            found[path.stem.split("-")[-2]] = [metric.value for metric in metrics if metric is not None]
    if len(found) < 2:
        raise OutputError(f"{folder} has retrained models of {len(found)} seeds; the gap is between two")
    return {
        (one, other): sum(abs(a - b) for a, b in zip(found[one], found[other], strict=True)) / len(MEASURED)
        for one, other in combinations(found, 2)
    }


if __name__ == "__main__":
    sys.exit(main())
