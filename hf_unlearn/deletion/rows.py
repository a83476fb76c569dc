"""Models, tokenizers, processors and rows by name: folders, or ids on the Hub."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets

from hf_unlearn.data.checks import require_disjoint
from hf_unlearn.data.encoding import encode_dataset
from hf_unlearn.data.formats import Row
from hf_unlearn.data.row_filters import read_requests, rows_by_index, rows_requested, rows_where
from hf_unlearn.data.row_identity import row_hash
from hf_unlearn.data.splits import load_rows
from hf_unlearn.deletion.arguments import RunArguments
from hf_unlearn.errors import DataError, SettingsError


def forget_rows(args: RunArguments) -> datasets.Dataset:
    """The raw rows to forget: a split, or those of it that a filter or a file selects; or a file's own rows.

    Raises:
        DataError: No such split, or nothing selected.
        SettingsError: Two ways to select at once.
    """
    return selected_rows(where_selected(args))


def where_selected(args: RunArguments) -> dict[str, Any]:
    """Where the rows to forget are, for `selected_rows`: data set, split and, of some of its rows, their numbers.

    Errors are those of `forget_rows`.
    """
    given = {"filter": args.forget_filter, "indices": args.forget_indices, "request": args.forget_request}
    chosen = {name: value for name, value in given.items() if value is not None}
    if len(chosen) > 1:
        raise SettingsError(f"pass only one of {' and '.join('--forget_' + name for name in chosen)}")
    if args.forget_request is not None and not (args.forget or args.train):  # the file has the rows themselves
        return {"request": str(Path(args.forget_request).resolve())}
    place = str(Path(args.dataset_name).resolve()) if Path(args.dataset_name).is_dir() else args.dataset_name
    where: dict[str, Any] = {"dataset_name": place, "forget": args.forget or (args.train if chosen else "")}
    for name, value in chosen.items():
        select = {"filter": rows_where, "indices": rows_by_index, "request": rows_requested}[name]
        where["numbers"] = select(load_rows(place, where["forget"], "forget"), value)
    return where


def selected_rows(where: Mapping[str, Any]) -> datasets.Dataset:
    """The raw rows that `where_selected` told of; raises `DataError` where they are not there any more."""
    if "request" in where:
        return datasets.Dataset.from_list(read_requests(where["request"]))
    rows = load_rows(where["dataset_name"], where["forget"], "forget")
    if any(number >= len(rows) for number in where.get("numbers", ())):
        raise DataError(f"split {where['forget']!r} has only {len(rows)} rows by now")
    return rows.select(where["numbers"]) if "numbers" in where else rows


def load_splits(
    args: RunArguments,
    tokenizer: Any,
    max_length: int | None,
    idk_seed: int | None = None,
    earlier: Mapping[str, Sequence[Row]] | None = None,
) -> dict[str, Any]:
    """Encoded rows by split; the retain split defaults to the train rows that are not to be forgotten.

    Rows that were forgotten `earlier` are in no train or retain split, and in splits of their own.
    """
    how: dict[str, Any] = {"max_length": max_length, "task": args.task}
    gone = {row_hash(row) for rows in (earlier or {}).values() for row in rows}

    def left(rows: Any) -> Any:
        return [row for row in rows if row_hash(row) not in gone] if gone else rows

    def encoded(splits: str, what: str) -> Any:
        return encode_dataset(load_rows(args.dataset_name, splits, what), tokenizer, what=what, **how)

    forget = encode_dataset(forget_rows(args), tokenizer, what="forget", idk_seed=idk_seed, **how)
    train = left(encoded(args.train, "train")) if args.train else []
    if args.retain:
        retain = left(encoded(args.retain, "retain"))
        require_disjoint(forget, retain)
    else:
        keys = {row_hash(row) for row in forget}
        retain = [row for row in train if row_hash(row) not in keys]
        if train and len(retain) != len(train) - len(forget):
            missing = len(retain) + len(forget) - len(train)
            raise DataError(f"{missing} forget rows are not in the train split {args.train!r}, or are in it twice")
    found = {"train": train, "forget": forget, "retain": retain}
    if not retain:
        found.pop("retain")
    if args.holdout:
        found["holdout"] = encoded(args.holdout, "holdout")
        require_disjoint(forget, found["holdout"], "holdout")
    for split in (args.eval_splits or "").split(","):
        if split.strip():
            name, _, rows = split.strip().rpartition("=")
            found[name.strip() or rows] = encoded(rows.strip(), "eval_splits")
    return found | dict(earlier or {})
