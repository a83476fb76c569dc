"""The rows of a request: which rows of which data set to forget, and all splits, encoded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
from torch import nn

from hf_unlearn.core.text import ShortRepr
from hf_unlearn.data.checks import require_disjoint
from hf_unlearn.data.encoding import encode_dataset
from hf_unlearn.data.formats import Row, rows_of
from hf_unlearn.data.row_filters import read_requests, rows_by_index, rows_requested, rows_where
from hf_unlearn.data.row_identity import row_hash
from hf_unlearn.data.splits import load_rows
from hf_unlearn.deletion.arguments import RunArguments
from hf_unlearn.deletion.checks import ModelPlan, check_classes, eval_splits
from hf_unlearn.errors import DataError, SettingsError
from hf_unlearn.models.tasks import Task

if TYPE_CHECKING:
    from hf_unlearn.models.tasks import ProcessingClass


@dataclass(frozen=True, kw_only=True)
class RowEncoding:
    """How raw rows become model inputs.

    Attributes:
        task: What the model does.
        max_length: Longest row in tokens; longer rows are cut.
        idk_seed: Seed of the "I don't know" answers of forget rows; None adds none.
        plan: The model that the rows are for; without it, lengths and labels are not checked.
    """

    task: Task
    max_length: int | None
    idk_seed: int | None = None
    plan: ModelPlan | None = None

    @cached_property
    def _outline(self) -> nn.Module | None:
        return None if self.plan is None else self.plan.outline()

    def encode(
        self, rows: Sequence[Row] | datasets.Dataset, tokenizer: ProcessingClass, what: str, with_idk: bool = True
    ) -> Sequence[Row]:
        """Encode `rows`; `what` names them in error messages."""
        if self.plan is not None and isinstance(rows, datasets.Dataset):
            check_classes(rows, what, self.plan)
        return encode_dataset(
            rows,
            tokenizer,
            what=what,
            max_length=self.max_length,
            model=self._outline,
            task=self.task,
            idk_seed=self.idk_seed if with_idk else None,
        )


@dataclass(frozen=True, repr=False)
class EncodedSplits(ShortRepr):
    """The encoded rows of a run.

    Attributes:
        forget: Rows to forget.
        train: Rows that the model was trained on, or is to be trained on; may be empty.
        copies: Further copies of forget rows among the train rows: they are forget rows too, and no retain rows.
        evaluation: Further splits to evaluate on: `retain`, `holdout`, those of `eval_splits`, and earlier requests.
    """

    forget: Sequence[Row]
    train: Sequence[Row] = ()
    copies: Sequence[Row] = ()
    evaluation: Mapping[str, Sequence[Row]] = field(default_factory=dict)


def forget_rows(args: RunArguments) -> datasets.Dataset:
    """Return the raw rows to forget: a split, those rows of it that a filter or a file selects, or a file's own rows.

    Raises:
        DataError: No such split, or no row is selected.
        SettingsError: More than one way to select.
    """
    return rows_at(locate_forget_rows(args))


def locate_forget_rows(args: RunArguments) -> dict[str, Any]:
    """Return where the rows to forget are, for `rows_at`: data set, split and, if only some are meant, their numbers.

    Raises:
        DataError, SettingsError: As `forget_rows`.
    """
    selections = {"filter": args.forget_filter, "indices": args.forget_indices, "request": args.forget_request}
    chosen = {name: value for name, value in selections.items() if value is not None}
    if len(chosen) > 1:
        raise SettingsError(f"pass only one of {' and '.join('--forget_' + name for name in chosen)}")
    if args.forget_request is not None and not (args.forget or args.train):  # the file has the rows themselves
        return {"request": str(Path(args.forget_request).resolve())}
    dataset = str(Path(args.dataset_name).resolve()) if Path(args.dataset_name).is_dir() else args.dataset_name
    where: dict[str, Any] = {"dataset_name": dataset, "forget": args.forget or (args.train if chosen else "")}
    for name, value in chosen.items():
        select = {"filter": rows_where, "indices": rows_by_index, "request": rows_requested}[name]
        where["numbers"] = select(load_rows(dataset, where["forget"], "forget"), value)
    return where


def rows_at(where: Mapping[str, Any]) -> datasets.Dataset:
    """Return the raw rows at the place that `locate_forget_rows` returned.

    Raises:
        DataError: They are not there any more.
    """
    if "request" in where:
        return datasets.Dataset.from_list(read_requests(where["request"]))
    rows = load_rows(where["dataset_name"], where["forget"], "forget")
    if any(number >= len(rows) for number in where.get("numbers", ())):
        raise DataError(f"split {where['forget']!r} now has only {len(rows)} rows; restore the data set of the request")
    return rows.select(where["numbers"]) if "numbers" in where else rows


def load_splits(
    args: RunArguments,
    tokenizer: ProcessingClass,
    encoding: RowEncoding,
    earlier: Mapping[str, Sequence[Row]] | None = None,
) -> EncodedSplits:
    """Load and encode all splits of a run.

    Args:
        args: Names of the splits. The retain split defaults to the train rows that are not to be forgotten.
        tokenizer: Tokenizer or image processor.
        encoding: How to encode the rows.
        earlier: Encoded rows of earlier requests, by split name. They are left out of the train and retain splits, and
            become splits of their own.

    Raises:
        DataError: A split that cannot be loaded, forget rows that are also retain or held-out rows, or that are not in
            the train split.
    """
    earlier = earlier or {}
    forgotten = {row_hash(row) for rows in earlier.values() for row in rows}

    def load(split: str, what: str) -> Sequence[Row]:
        return encoding.encode(load_rows(args.dataset_name, split, what), tokenizer, what, with_idk=False)

    def without_forgotten(rows: Sequence[Row]) -> Sequence[Row]:
        return [row for row in rows if row_hash(row) not in forgotten] if forgotten else rows

    forget = encoding.encode(forget_rows(args), tokenizer, "forget")
    train = without_forgotten(load(args.train, "train")) if args.train else []
    forget_keys = [row_hash(row) for row in rows_of(forget)]
    copies: list[Row] = []
    retain: Sequence[Row] = []
    if args.retain:
        retain = without_forgotten(load(args.retain, "retain"))
        require_disjoint(forget, retain)
    if args.train and (not args.retain or (args.subtract_forget and args.statistics is None)):
        rest, copies = _without_forget_rows(train, forget_keys, args.train)
        retain = retain if args.retain else rest
    evaluation: dict[str, Sequence[Row]] = {"retain": retain} if len(retain) else {}
    if args.holdout:
        evaluation["holdout"] = load(args.holdout, "holdout")
        require_disjoint(forget, evaluation["holdout"], "holdout")
    for name, split in eval_splits(args).items():
        evaluation[name] = load(split, "eval_splits")
    return EncodedSplits(forget, train, copies, {**evaluation, **earlier})


def _without_forget_rows(train: Sequence[Row], forget_keys: Sequence[bytes], split: str) -> tuple[list[Row], list[Row]]:
    """Return the train rows that are not forget rows, and the copies of forget rows beyond those of the forget set.

    Args:
        train: The rows of the train split.
        forget_keys: The hash of each forget row.
        split: Name of the train split.

    Raises:
        DataError: A forget row is not in the train split, or not as often as in the forget set.
    """
    asked, seen = Counter(forget_keys), Counter[bytes]()
    rest: list[Row] = []
    copies: list[Row] = []
    for row in rows_of(train):
        key = row_hash(row)
        if key not in asked:
            rest.append(row)
            continue
        seen[key] += 1
        if seen[key] > asked[key]:
            copies.append(row)
    missing = [number for number, key in enumerate(forget_keys) if not seen[key]]
    if missing:
        raise DataError(
            f"{len(missing)} forget rows are not in the train split {split!r} (of {len(forget_keys)}; first: row "
            f"{missing[0]} of the forget set); a model forgets only rows that it was trained on: pass the --train that "
            "has them"
        )
    repeated = next((number for number, key in enumerate(forget_keys) if asked[key] > seen[key]), None)
    if repeated is not None:
        key = forget_keys[repeated]
        raise DataError(
            f"row {repeated} of the forget set is in it {asked[key]} times, and in the train split {split!r} only "
            f"{seen[key]} times; remove the further copies from the forget set"
        )
    return rest, copies
