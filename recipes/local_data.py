"""Write rows of public data sets as local splits, for machines that cannot reach the Hub.

    python recipes/local_data.py sst2 FOLDER_OF_TSV outputs/sst2             # train, validation, test
    python recipes/local_data.py sst2 FOLDER_OF_TSV outputs/sst2 --flip 346  # also poisoned and clean, see below
    python recipes/local_data.py images cifar10.npz outputs/cifar10          # x_train, y_train, x_test, y_test
    python recipes/local_data.py images mnist.npz outputs/mnist
    python recipes/local_data.py digits - outputs/digits                     # digits of scikit-learn; no file is read

With `--flip N` the split `poisoned` is `train` with wrong labels on the first N rows, and the split `clean` has these N
rows with the right labels: if `poisoned[0:N]` is forgotten, accuracy on `clean` recovers. The digits are split 80:20 by
class. `test_without_3` is `test` without class 3, for evaluation when that class is forgotten.
"""

import argparse
import csv
import sys
from pathlib import Path

import datasets
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from hf_unlearn import DataError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("sst2", "images", "digits"))
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--flip", type=int, default=0, metavar="N", help="give N training rows a wrong label")
    parser.add_argument("--seed", type=int, default=0, help="seed of the row order and of the wrong labels")
    args = parser.parse_args()
    generator = np.random.default_rng(args.seed)
    try:
        splits = {"sst2": sst2, "images": images, "digits": digits}[args.kind](args.source)
        if not 0 <= args.flip <= len(splits["train"]):
            raise DataError(f"--flip must be 0 to {len(splits['train'])}, the training rows, got {args.flip}")
    except DataError as error:
        print(f"local_data.py: {error}", file=sys.stderr)
        return 2
    order = generator.permutation(len(splits["train"]))
    splits["train"] = splits["train"].select(order)
    if args.flip:
        splits |= flipped(splits["train"], args.flip, generator)
    for name, rows in splits.items():
        rows.to_parquet(args.folder / f"{name}.parquet")
        print(f"{args.folder / name}.parquet: {len(rows)} rows")
    return 0


def sst2(folder: Path) -> dict[str, datasets.Dataset]:
    """Read `train`, `validation` and `test` from tab-separated files `train`, `dev` and `test`."""
    splits = {}
    for name, file in (("train", "train"), ("validation", "dev"), ("test", "test")):
        try:
            with (folder / f"{file}.tsv").open(newline="", encoding="utf-8") as lines:
                rows = list(csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
        except OSError as error:
            raise DataError(f"cannot read {folder / file}.tsv: {error.strerror}") from error
        splits[name] = datasets.Dataset.from_dict({"text": [r[0] for r in rows], "label": [int(r[1]) for r in rows]})
    return splits


def images(path: Path) -> dict[str, datasets.Dataset]:
    """Read `train` and `test` from arrays of pixels."""
    arrays = read_arrays(path)
    return {name: _pictures(arrays[f"x_{name}"], arrays[f"y_{name}"]) for name in ("train", "test")}


def digits(ignored: Path) -> dict[str, datasets.Dataset]:
    """Return `train`, `test` and `test_without_3` of scikit-learn's digits: 8 x 8 pixels, grey levels 0 to 255."""
    pixels, labels = load_digits(return_X_y=True)
    pixels = np.round(pixels.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=0)
    indices = {"train": train, "test": test, "test_without_3": test[labels[test] != 3]}
    return {name: _pictures(pixels[chosen], labels[chosen]) for name, chosen in indices.items()}


def read_arrays(path: Path) -> dict[str, NDArray]:
    """Read `x_train [N, H, W, C]` or `[N, H, W]`, `y_train [N]`, `x_test` and `y_test` of an npz file.

    Raises:
        DataError: The file does not exist, has another format, or lacks an array.
    """
    names = [f"{kind}_{part}" for part in ("train", "test") for kind in "xy"]
    try:
        with np.load(path) as file:
            return {name: file[name] for name in names}
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{path} is not an npz file with {', '.join(names)}: {error}") from error


def _pictures(pixels: NDArray, labels: NDArray) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [Image.fromarray(picture) for picture in pixels], "label": labels.reshape(-1).tolist()}
    return datasets.Dataset.from_dict(rows, features=features)


def flipped(train: datasets.Dataset, count: int, generator: np.random.Generator) -> dict[str, datasets.Dataset]:
    """Return `poisoned`, the training rows with the first `count` labels changed, and `clean`, these rows unchanged."""
    labels = np.array(train["label"])
    classes = labels.max() + 1
    labels[:count] = (labels[:count] + generator.integers(1, classes, count)) % classes
    poisoned = train.remove_columns("label").add_column("label", labels.tolist())  # type: ignore[call-arg]
    return {"poisoned": poisoned, "clean": train.select(range(count))}


if __name__ == "__main__":
    sys.exit(main())
