"""Measure how far apart retrained models of different seeds are. No unlearned model can be expected to come closer.

    python recipes/experiments/floor.py outputs/default/minilm_sst2

The folder is the output of `hf-unlearn benchmark` for a classifier with several seeds. Its retrained models were
trained on the same rows. The script prints the average gap of each pair: the mean absolute difference of forget, retain
and held-out accuracy and MIA-efficacy.
"""

import argparse
import sys
from itertools import combinations
from pathlib import Path

from hf_unlearn import OutputError, UnlearningReport
from hf_unlearn.benchmark import CELLS_FOLDER

MEASURED = (("accuracy", "forget"), ("accuracy", "retain"), ("accuracy", "holdout"), ("membership_efficacy", "forget"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    try:
        gaps = pairs(args.folder)
    except OutputError as error:
        print(f"floor.py: {error}", file=sys.stderr)
        return 2
    for (first, second), gap in gaps.items():
        print(f"seeds {first} and {second}: {gap:.4f}")
    print(f"mean: {sum(gaps.values()) / len(gaps):.4f}")
    return 0


def pairs(folder: Path) -> dict[tuple[str, str], float]:
    """Return the average gap of every pair of seeds.

    Raises:
        OutputError: Fewer than two seeds have a retrained model.
    """
    accuracies: dict[str, list[float]] = {}
    for path in sorted((folder / CELLS_FOLDER).glob("*.json")):
        report = UnlearningReport.load(path)
        metrics = [report.get(name, split, "retrained") for name, split in MEASURED]
        if all(metrics):
            accuracies[path.stem.split("-")[-2]] = [metric.value for metric in metrics if metric is not None]
    if len(accuracies) < 2:
        raise OutputError(f"{folder} has retrained models of {len(accuracies)} seeds; a gap needs at least two")
    return {
        (first, second): sum(abs(a - b) for a, b in zip(accuracies[first], accuracies[second], strict=True))
        / len(MEASURED)
        for first, second in combinations(accuracies, 2)
    }


if __name__ == "__main__":
    sys.exit(main())
