"""From rows as users have them to batches as models take them, and the pairing of forget with retain rows.

Raw rows are those of `formats`; already tokenised rows (`input_ids`, ...) and image rows (`pixel_values`, `labels`)
pass through unchanged. Other answers (`alternatives`) are encoded beside a row's own, for the metrics that compare with
them.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from typing import Any

from torch import nn
from torch.utils.data import Dataset, IterableDataset

from hf_unlearn.core.processes import world
from hf_unlearn.data.checks import require_rows
from hf_unlearn.data.formats import ENCODERS, MODEL_INPUTS, Encode, Encoding, Row
from hf_unlearn.data.row_identity import row_hash
from hf_unlearn.data.wrong_answers import WRONG, with_alternatives
from hf_unlearn.errors import DataError
from hf_unlearn.models.tasks import Task, task_of


def encode_dataset(
    dataset: Any,
    processing_class: Any,
    *,
    what: str = "given",
    max_length: int | None = None,
    model: nn.Module | None = None,
    task: Task | None = None,
    idk_seed: int | None = None,
    streams: bool = False,
) -> Any:
    """Make model inputs of rows of any of the formats of `formats`; rows that are model inputs already pass through.

    The `alternate` answer of a language model's row becomes a row of its own, under `alternate`. Images are encoded
    each time they are read.

    Args:
        dataset: `datasets.Dataset`, any sequence of rows, or a `datasets.IterableDataset`.
        processing_class: The model's tokenizer or image processor; not needed for rows that are model inputs.
        what: The name of the set in error messages.
        max_length: Longest row in tokens; longer rows are cut at the end.
        model: Says what raw rows are to become (`predictions.task_of`), how many classes there are, and its context.
        task: What raw rows are to become, in place of what `model` says; default `language-model`.
        idk_seed: Give each row of a language model an alternate answer that says "I don't know", drawn by this seed
            and the row's content.
        streams: Take a stream too, and return a `RowStream`.

    Returns:
        Rows with `input_ids`, `attention_mask` and `labels` (-100 on the prompt; or the class), as a list, with
        `alternatives` where there are wrong answers; rows with `pixel_values` and `labels`; a `RowStream`; or `dataset`
        itself.

    Raises:
        DataError: No rows, a stream where rows are needed, none of the task's formats, no tokenizer, a row with
            nothing left to predict or longer than the context, or a label that is no class of the model.
    """
    streamed = not hasattr(dataset, "__len__") and dataset is not None
    if not streamed:
        require_rows(dataset, what)
    elif not streams:
        raise DataError(f"the {what} set is a stream, which only collect_statistics reads; make it a list or a Dataset")
    first = next(iter(dataset), None) if streamed else dataset[0]
    if first is None:
        raise DataError(f"the {what} set is empty; give it at least one row")
    if set(first) & set(MODEL_INPUTS):
        return RowStream(dataset, lambda row, index: dict(row)) if streamed else dataset
    task = task or (task_of(model) if model is not None else None) or "language-model"
    encode = ENCODERS[task](set(first), Encoding(processing_class, what, max_length, model))
    if WRONG in first and task == "language-model":
        encode = with_alternatives(encode, what)
    if idk_seed is not None:
        encode = _with_idk(encode, idk_seed)
    if streamed:
        return RowStream(dataset, encode)
    if task == "image-classification":  # all of them at once would take too much memory
        return EncodedRows(dataset, encode)
    return [encode(dataset[index], index) for index in range(len(dataset))]


@dataclass(frozen=True)
class EncodedRows(Dataset):
    """Rows that are encoded when they are read."""

    dataset: Any
    encode: Encode

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.encode(self.dataset[index], index)


def idk_answers() -> list[str]:
    """The answers that say "I don't know", shipped with the package."""
    return (files("hf_unlearn.data") / "idk.txt").read_text(encoding="utf-8").splitlines()


def _with_idk(encode: Encode, seed: int) -> Encode:
    answers = idk_answers()

    def with_answer(row: Row, index: int) -> dict[str, Any]:
        drawn = hashlib.sha256(f"{seed}:".encode() + row_hash(row)).digest()
        return encode({**row, "alternate": answers[int.from_bytes(drawn, "big") % len(answers)]}, index)

    return with_answer


class RowStream(IterableDataset):
    """Rows of a stream, encoded one by one; every process reads all of it and keeps each `n`-th row.

    Attributes:
        total: Rows of the whole stream, once it has been read.
    """

    def __init__(self, dataset: Any, encode: Encode, max_rows: int | None = None):
        self.dataset, self.encode, self.max_rows = dataset, encode, max_rows
        self.total = 0

    def first(self) -> dict[str, Any]:
        return self.encode(next(iter(self.dataset)), 0)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rank, size = world()
        self.total = 0
        for index, row in enumerate(islice(iter(self.dataset), self.max_rows)):
            self.total = index + 1
            if index % size == rank:
                yield self.encode(row, index)
