"""Loading raw rows by the name of a data set and of its splits."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from hf_unlearn.core.text import one_line
from hf_unlearn.data.checks import require_rows
from hf_unlearn.errors import DataError

if TYPE_CHECKING:
    import datasets

_BUILDERS = {"json": "json", "jsonl": "json", "parquet": "parquet"}
_SPEC = re.compile(r"((?P<config>[\w.-]+)/)?(?P<name>[\w.-]+)(?P<slice>\[\d*:\d*\])?")


def load_rows(dataset_name: str, splits: str, what: str) -> "datasets.Dataset":
    """Load the rows of one or more splits, `name` or `name[start:stop]`, separated by commas.

    A name is a file of a local folder, a configuration of a Hub data set, or a split of it; `config/name` is a split
    of one of its configurations, or a file of a subfolder.

    >>> import pathlib, tempfile
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> _ = (folder / "people.jsonl").write_text("".join(f'{{"id": {n}}}\\n' for n in range(4)))
    >>> load_rows(str(folder), "people[0:1],people[2:4]", "forget")["id"][:]
    [0, 2, 3]

    Args:
        dataset_name: A local folder, or the name of a data set on the Hub.
        splits: The splits.
        what: The name of the set in errors and of its flag.

    Raises:
        DataError: A split is malformed, missing or empty.
    """
    import datasets

    if not splits:
        raise DataError(f"no {what} split was named; pass --{what} such as --{what} 'full[0:20]'")
    loaded = [_load_split(dataset_name, split.strip()) for split in splits.split(",")]
    rows = datasets.concatenate_datasets(loaded) if len(loaded) > 1 else loaded[0]
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
        for suffix, builder in _BUILDERS.items():
            if (path := folder / f"{match['name']}.{suffix}").is_file():
                return datasets.load_dataset(builder, data_files=str(path), split=part)
        raise DataError(f"{folder} has no {match['name']}.json, .jsonl or .parquet")
    except DataError:
        raise
    except StopIteration as error:  # how datasets says that a file has no rows
        raise DataError(f"split {split!r} of {dataset_name!r} has no rows; fill it in or name another") from error
    except Exception as error:  # datasets raises errors of many types
        raise DataError(f"cannot load split {split!r} of {dataset_name!r}: {one_line(error)}") from error
