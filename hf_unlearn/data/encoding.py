"""From rows as users have them to rows as models take them.

The way of a row into a model:

    raw row      {"question": "Where does Ada live?", "answer": "In Ulm."}
        |        `encode_dataset`: an encoder of the task (`encoders`) is chosen by the columns (`formats`) and applied
    encoded row  {"input_ids": [5, 6, 9], "attention_mask": [1, 1, 1], "labels": [-100, -100, 9]}
        |        `batches.PaddingCollator`: rows are padded to one length and stacked (`pairs`: forget with retain rows)
    batch        {"input_ids": [B, T], "attention_mask": [B, T], "labels": [B, T]}
        |        `models.forward.predict`: a forward pass
    predictions  logits `[L, V]` and labels `[L]` at the L positions whose label is not -100

Rows that are encoded already (tokens, `pixel_values`) skip the first step. Encoded rows may hold further rows: an
`alternate` answer for losses that compare with it, and `alternatives` for metrics that do (`wrong_answers`).
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from torch import nn
from torch.utils.data import IterableDataset

from hf_unlearn.core.processes import world
from hf_unlearn.core.text import ShortRepr
from hf_unlearn.data.checks import check_container, check_row, require_continuing, require_rows
from hf_unlearn.data.encoders import ENCODERS, Encode, EncodingContext
from hf_unlearn.data.formats import LABELS, MODEL_INPUTS, Row, Rows
from hf_unlearn.data.left_out import CutRow, LeftOut
from hf_unlearn.data.row_identity import row_hash
from hf_unlearn.data.tokenized import MASKS, may_be_packed, means_labels, refuse_packed, with_labels
from hf_unlearn.data.wrong_answers import WRONG, with_alternatives
from hf_unlearn.errors import DataError
from hf_unlearn.models.causality import sees_what_follows
from hf_unlearn.models.tasks import Task, task_of

if TYPE_CHECKING:
    import datasets

    from hf_unlearn.models.tasks import ProcessingClass

_NO_ROW: Any = object()


@overload
def encode_dataset(
    dataset: "Rows | None",
    processing_class: "ProcessingClass | None",
    *,
    what: str = ...,
    max_length: int | None = ...,
    model: nn.Module | None = ...,
    task: Task | None = ...,
    idk_seed: int | None = ...,
    streams: Literal[False] = ...,
) -> Sequence[Row]: ...


@overload
def encode_dataset(
    dataset: "Rows | datasets.IterableDataset | None",
    processing_class: "ProcessingClass | None",
    *,
    what: str = ...,
    max_length: int | None = ...,
    model: nn.Module | None = ...,
    task: Task | None = ...,
    idk_seed: int | None = ...,
    streams: bool,
) -> Any: ...


def encode_dataset(
    dataset: "Rows | datasets.IterableDataset | None",
    processing_class: "ProcessingClass | None",
    *,
    what: str = "given",
    max_length: int | None = None,
    model: nn.Module | None = None,
    task: Task | None = None,
    idk_seed: int | None = None,
    streams: bool = False,
) -> "Sequence[Row] | RowStream":
    """Make model inputs of rows in any of the formats of `formats`; return rows that are model inputs already as is.

    Rows of tokens without labels get those that trl's `SFTTrainer` trains on (`tokenized`): the tokens themselves, or
    those in a `completion_mask` or `assistant_masks`.

    The `alternate` answer of a language model's row becomes a row of its own, under `alternate`. Images are encoded
    each time they are read.

    >>> class Words:  # stands for a tokenizer
    ...     eos_token_id = 0
    ...     def encode(self, text, add_special_tokens=True):
    ...         return [len(word) for word in text.split()]
    >>> encode_dataset([{"prompt": "Ada lives", "completion": " in Ulm"}], Words())
    [{'input_ids': [3, 5, 2, 3, 0], 'attention_mask': [1, 1, 1, 1, 1], 'labels': [-100, -100, 2, 3, 0]}]

    Args:
        dataset: `datasets.Dataset`, any sequence of rows, or a `datasets.IterableDataset`.
        processing_class: The model's tokenizer or image processor; not needed for rows that are model inputs.
        what: The name of the set in error messages.
        max_length: Longest row in tokens; longer raw rows are cut at the end, which is a warning and counted in the
            attribute `left_out` of the list, or of the stream once it has been read.
        model: Determines the task (`models.tasks.task_of`), the number of classes, and the context.
        task: The task, instead of the model's; default `language-model`.
        idk_seed: Give each row of a language model an alternate answer that says "I don't know", drawn by this seed
            and the row's content.
        streams: Also take a stream, and return a `RowStream` for it.

    Returns:
        Rows with `input_ids`, `attention_mask` and `labels` (-100 on the prompt; or the class), as a list, with
        `alternatives` if there are wrong answers; rows with `pixel_values` and `labels`; a `RowStream`; or `dataset`
        itself.

    Raises:
        DataError: There are no rows; a stream where rows are needed; columns of none of the task's formats; no
            tokenizer; a row with nothing left to predict, or longer than the context; a label that is not a class of
            the model; a row that was packed.
    """
    rows: Any = dataset
    check_container(rows, what)
    streamed = rows is not None and (not hasattr(rows, "__len__") or isinstance(rows, IterableDataset))
    if not streamed:
        require_rows(rows, what)
    elif not streams:
        raise DataError(f"the {what} set is a stream, which only collect_statistics reads; make it a list or a Dataset")
    first = next(iter(rows), _NO_ROW) if streamed else rows[0]
    if first is _NO_ROW:
        raise DataError(f"the {what} set is empty; give it at least one row")
    for index, row in enumerate(rows if isinstance(rows, (list, tuple)) else [first]):
        check_row(row, what, index)
    task = task or (task_of(model) if model is not None else None) or "language-model"
    if set(first) & set(MODEL_INPUTS):
        return _complete(rows, first, what, task, model, streamed)
    if model is not None:
        require_continuing(model, first, what)
    context = EncodingContext(processing_class, what, max_length, model)
    encode = ENCODERS[task](set(first), context)
    if WRONG in first and task == "language-model":
        encode = with_alternatives(encode, what)
    if idk_seed is not None:
        encode = _with_idk(encode, idk_seed)
    encode = _counting(encode, context)
    if streamed:
        return RowStream(rows, encode, what=what, max_length=max_length)
    if task == "image-classification":  # the pixels of all rows at once would take too much memory
        return EncodedRows(rows, encode)
    encoded = EncodedList(encode(rows[index], index) for index in range(len(rows)))
    encoded.raw, encoded.unknown = rows, getattr(processing_class, "unk_token_id", None)
    encoded.left_out.warn(what, max_length)
    return encoded


def _complete(rows: Any, first: Row, what: str, task: Task, model: nn.Module | None, streamed: bool) -> Any:
    """Return encoded rows or a stream of them, checked and with the labels that follow from their other columns."""
    masks = tuple(name for name in MASKS if name in first)
    continues = task == "language-model" if model is None else _continues(model)
    has_class = model is None and any(name in first for name in LABELS)  # which may be of a text of another task
    labelled = means_labels(first) and (bool(masks) or (continues and not has_class))
    checked = labelled or may_be_packed(first)

    def complete(row: Row, index: int) -> dict[str, Any]:
        check_row(row, what, index)
        where = f"row {index} of the {what} set"
        refuse_packed(row, where)
        return with_labels(row, where, masks) if labelled else dict(row)

    if model is not None:
        require_continuing(model, complete(first, 0) if checked else first, what)
    if streamed:
        return RowStream(rows, complete)
    completed = EncodedList(complete(rows[index], index) for index in range(len(rows) if checked else 0))
    return completed if labelled else rows


def _continues(model: nn.Module) -> bool:
    """Return whether a model predicts each token from those before it."""
    return task_of(model) == "language-model" and not sees_what_follows(model)


def _counting(encode: Encode, context: EncodingContext) -> Encode:
    """Return an encoder whose rows carry how many of their tokens were left out."""

    def encode_and_count(row: Row, index: int) -> dict[str, Any]:
        check_row(row, context.what, index)
        before = context.left_out.tokens
        encoded = encode({name: _listed(value) for name, value in row.items()}, index)
        left_out = context.left_out.tokens - before
        return CutRow(encoded, left_out) if left_out else encoded

    return encode_and_count


def _listed(value: Any) -> Any:
    """Return an array of texts or of mappings, as data sets in numpy format have it, as a list."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "OU":
        return [_listed(item) for item in value.tolist()]
    return {name: _listed(item) for name, item in value.items()} if isinstance(value, Mapping) else value


class EncodedList(list[dict[str, Any]]):
    """Encoded rows in memory.

    Attributes:
        raw: The raw rows that they were made of.
        unknown: The token that stands for everything that the tokenizer does not know.
    """

    raw: Rows | None = None
    unknown: int | None = None

    @property
    def left_out(self) -> LeftOut:
        """How many of the rows were cut at `max_length`, and by how many tokens."""
        return LeftOut.of(self)


@dataclass(frozen=True, repr=False)
class EncodedRows(ShortRepr, Sequence[Row]):
    """Rows that are encoded when they are read."""

    dataset: Rows
    encode: Encode

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:  # type: ignore[override]  # rows are read one by one
        return self.encode(self.dataset[index], index)


def idk_answers() -> list[str]:
    """Return the answers that say "I don't know", which come with the package."""
    return (files("hf_unlearn.data") / "idk.txt").read_text(encoding="utf-8").splitlines()


def _with_idk(encode: Encode, seed: int) -> Encode:
    answers = idk_answers()

    def encode_with_idk(row: Row, index: int) -> dict[str, Any]:
        drawn = hashlib.sha256(f"{seed}:".encode() + row_hash(row)).digest()
        return encode({**row, "alternate": answers[int.from_bytes(drawn, "big") % len(answers)]}, index)

    return encode_with_idk


class RowStream(IterableDataset):
    """Rows of a stream, encoded one by one; each of n processes reads all of it and keeps every n-th row.

    Attributes:
        total: Number of rows of the stream, once it has been read to the end.
        left_out: How many of this process's rows were cut at `max_length`; a warning says so at the end.
    """

    def __init__(
        self,
        dataset: "datasets.IterableDataset",
        encode: Encode,
        max_rows: int | None = None,
        *,
        what: str = "given",
        max_length: int | None = None,
    ):
        self.dataset, self.encode, self.max_rows = dataset, encode, max_rows
        self.what, self.max_length = what, max_length
        self.total = 0
        self.left_out = LeftOut()
        self._warned = False

    def limited(self, max_rows: int | None) -> "RowStream":
        """Return the first rows of the stream."""
        return RowStream(self.dataset, self.encode, max_rows, what=self.what, max_length=self.max_length)

    def first(self) -> dict[str, Any]:
        """Return the first row, encoded."""
        return self.encode(next(iter(self.dataset)), 0)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rank, size = world()
        self.total, self.left_out = 0, LeftOut()
        for index, row in enumerate(islice(iter(self.dataset), self.max_rows)):
            self.total = index + 1
            if index % size == rank:
                encoded = self.encode(row, index)
                self.left_out = self.left_out.plus(encoded)
                yield encoded
        if not self._warned:  # statistics may read a stream several times
            self._warned = True
            self.left_out.warn(self.what, self.max_length)
