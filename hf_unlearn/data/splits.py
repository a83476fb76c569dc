"""Rows by the name of a data set and its splits."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from hf_unlearn.data.checks import require_rows
from hf_unlearn.errors import DataError

if TYPE_CHECKING:
    import datasets

_FILES = {"json": "json", "jsonl": "json", "parquet": "parquet"}
_SPEC = re.compile(r"((?P<config>[\w.-]+)/)?(?P<name>[\w.-]+)(?P<slice>\[\d*:\d*\])?")


def load_rows(dataset_name: str, splits: str, what: str) -> "datasets.Dataset":
    """Rows of `name[start:stop]` splits: files of a local folder, configurations of a Hub data set, or its splits.

    `config/name` is a split of one of its configurations, or a file of a subfolder.

    Raises:
        DataError: A malformed or missing split, or one without rows.
    """
    import datasets

    if not splits:
        raise DataError(f"no {what} split was named; pass --{what} such as --{what} 'full[0:20]'")
    parts = [_load_split(dataset_name, part.strip()) for part in splits.split(",")]
    rows = datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    require_rows(rows, what)
    return rows


def _load_split(dataset_name: str, split: str) -> "datasets.Dataset":
    import datasets

    match = _SPEC.fullmatch(split)
    if match is None:
        raise DataError(f"split {split!r} is malformed; write name, name[start:stop] or config/name")
    part = f"train{match['slice'] or ''}"
    folder = Path(dataset_name)
    try:
        if not folder.is_dir():
            if match["config"]:
                return datasets.load_dataset(dataset_name, match["config"], split=split.partition("/")[2])
            if match["name"] in datasets.get_dataset_config_names(dataset_name):
                return datasets.load_dataset(dataset_name, match["name"], split=part)
            return datasets.load_dataset(dataset_name, split=split)
        folder = folder / (match["config"] or "")
        files = ((folder / f"{match['name']}.{suffix}", kind) for suffix, kind in _FILES.items())
        found = [(path, kind) for path, kind in files if path.is_file()]
        if not found:
            raise DataError(f"{folder} has no {match['name']}.json, .jsonl or .parquet")
        return datasets.load_dataset(found[0][1], data_files=str(found[0][0]), split=part)
    except DataError:
        raise
    except Exception as error:  # datasets raises many kinds
        raise DataError(f"cannot load split {split!r} of {dataset_name!r}: {str(error).splitlines()[0]}") from error
