"""Batches of encoded rows: padding, and the share of each process."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from hf_unlearn.core.processes import own_indices
from hf_unlearn.data.encoding import RowStream
from hf_unlearn.data.formats import CONTENT_COLUMNS, LABELS, MODEL_INPUTS, Row, Rows
from hf_unlearn.errors import DataError
from hf_unlearn.models.tasks import CONTENT_MASK, IGNORED, Batch, Collator

AnyRows = TypeVar("AnyRows", bound=Rows | RowStream)


def take(rows: AnyRows, max_rows: int | None) -> AnyRows:
    """Return the first rows of encoded rows or of a stream; all of them if `max_rows` is None."""
    if isinstance(rows, RowStream):
        return cast(AnyRows, rows.limited(max_rows))
    return rows if max_rows is None or max_rows >= len(rows) else cast(AnyRows, select(rows, range(max_rows)))


def select(rows: Rows, numbers: Sequence[int]) -> Rows:
    """Return the rows of these numbers, read when they are needed."""
    return Subset(cast(Dataset, rows), numbers)


def own_batches(rows: Rows | RowStream, collator: Collator, batch_size: int) -> Iterator[tuple[Batch, bool]]:
    """Yield the batches of this process's share of encoded rows, each with whether it counts.

    Every process gets the same number of batches, because every process takes part in each forward pass of a sharded
    model. Batches that only fill up the number do not count.
    """
    collator = with_content_mask(collator)
    generator = torch.Generator()  # a loader draws a seed even without shuffling; the global state must not change
    share: Rows | RowStream = rows
    counted = True
    if not isinstance(rows, RowStream):
        indices = own_indices(len(rows))
        share, counted = select(rows, indices or range(1)), bool(indices)
    batch: Batch | None = None
    n_batches = 0
    for batch in DataLoader(cast(Dataset, share), batch_size=batch_size, collate_fn=collator, generator=generator):
        n_batches += 1
        yield batch, counted
    total = rows.total if isinstance(rows, RowStream) else len(rows)
    most = len(range(0, len(own_indices(total, 0)), batch_size))  # process 0 has the most rows
    for _ in range(most - n_batches):
        if batch is None:
            assert isinstance(rows, RowStream)  # with fewer rows than processes
            batch = collator([rows.first()])
        yield batch, False


@dataclass(frozen=True)
class PaddingCollator:
    """Stack B rows into a batch, padding token sequences on the right, or on the left with `side="left"`.

    A column that does not make a tensor (texts, dates, alternative answers, None, tables of unequal sizes) is left out,
    and `label` is renamed to `labels`. Of the other columns, the model gets those that it takes
    (`models.arguments.taken_inputs`). Labels are padded with -100, `input_ids` with `pad_token_id`, other sequences
    with 0.

    >>> batch = PaddingCollator(pad_token_id=9)([{"input_ids": [1, 2], "label": 0}, {"input_ids": [3], "label": 1}])
    >>> batch["input_ids"].tolist(), batch["attention_mask"].tolist(), batch["labels"].tolist()
    ([[1, 2], [3, 9]], [[1, 1], [1, 0]], [0, 1])
    """

    pad_token_id: int = 0
    side: str = "right"

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Return the batch: tensors `[B, ...]` by argument name of the model."""
        batch = {}
        for name in rows[0]:
            if name in CONTENT_COLUMNS and name != CONTENT_MASK:  # an empty list of texts would make a tensor
                continue
            required = name in (*LABELS, *MODEL_INPUTS, "attention_mask")
            some_or_all = any if required else all  # an input that only some rows have is an error, not left out
            if not some_or_all(_is_number_like(row.get(name)) for row in rows):
                continue
            try:
                batch["labels" if name in LABELS else name] = self._stack(name, _tensors(rows, name))
            except DataError:  # of numbers of unequal sizes, or too large for a tensor
                if required:
                    raise
        if "input_ids" in batch and "attention_mask" not in batch:
            ones = [torch.ones(len(row["input_ids"])) for row in rows]
            batch["attention_mask"] = self._stack("attention_mask", ones).long()
        return batch

    def _stack(self, name: str, tensors: list[Tensor]) -> Tensor:
        if tensors[0].ndim != 1 or len({len(tensor) for tensor in tensors}) == 1:
            return _stacked(tensors, name)
        value = {"input_ids": self.pad_token_id, "labels": IGNORED}.get(name, 0)
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=self.side)


@dataclass(frozen=True)
class ContentCollator:
    """Make batches with another collator, and add `content_mask` where every row has one.

    A collator of transformers refuses columns that it does not know, or does not pad them, so it does not see them.

    >>> rows = [{"input_ids": [1, 2], "labels": [-100, 2], "content_mask": [0, 1]}]
    >>> ContentCollator(PaddingCollator())(rows)["content_mask"].tolist()
    [[0, 1]]

    Attributes:
        collator: Makes a batch of encoded rows; it may pad the labels, not change them.
    """

    collator: Collator

    def __call__(self, rows: Sequence[Row]) -> Batch:
        """Return the batch; raise `DataError` if the collator has changed the number of labels."""
        masks = [row.get(CONTENT_MASK) for row in rows]
        plain = [{name: value for name, value in row.items() if name not in CONTENT_COLUMNS} for row in rows]
        batch = dict(self.collator(plain))
        if any(mask is None for mask in masks):
            return batch
        kept = [np.asarray(row["labels"]) != IGNORED for row in rows]
        values = np.concatenate([np.asarray(mask)[keep] for mask, keep in zip(masks, kept, strict=True)])
        is_label = batch["labels"] != IGNORED
        if int(is_label.sum()) != len(values):
            raise DataError(
                f"the collator makes {int(is_label.sum())} labels of the {len(values)} of its rows; use one that only "
                "pads them, such as PaddingCollator"
            )
        content = torch.zeros_like(batch["labels"])
        content[is_label] = torch.as_tensor(values).to(content)
        return {**batch, CONTENT_MASK: content}


def with_content_mask(collator: Collator) -> Collator:
    """Return a collator that batches the column `content_mask` as well."""
    return collator if isinstance(collator, (PaddingCollator, ContentCollator)) else ContentCollator(collator)


def _stacked(tensors: list[Tensor], name: str) -> Tensor:
    """Stack tensors of one size; raise `DataError` if they have several."""
    sizes = {tuple(tensor.shape) for tensor in tensors}
    if len(sizes) > 1:
        shown = " and ".join(str(list(size)) for size in sorted(sizes)[:2])
        raise DataError(f"a batch has values of sizes {shown} in column {name!r}; give all rows the same size")
    return torch.stack(tensors)


def _is_number_like(value: object) -> bool:
    """Return whether a value is a number, or numbers in an array or nested lists."""
    if isinstance(value, (Tensor, bool, int, float)):
        return True
    if isinstance(value, (list, tuple)):
        return all(map(_is_number_like, value))
    return isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biuf"


def _tensors(rows: Sequence[Row], name: str) -> list[Tensor]:
    """Return a column as tensors; raise `DataError` with the number of the row whose value is none."""
    tensors = []
    for number, row in enumerate(rows):
        try:
            tensors.append(_tensor(row[name]))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            value = f"{row[name]!r:.60}" if name in row else "no value"
            raise DataError(
                f"row {number} of a batch of {len(rows)} has {value} in column {name!r}; give numbers in every row"
            ) from error
    return tensors


def _tensor(value: object) -> Tensor:
    """Convert as `torch.as_tensor`, but quickly for long nested lists: Python floats get the default dtype."""
    if not isinstance(value, (list, float)):
        return torch.as_tensor(value)
    tensor = torch.as_tensor(np.asarray(value))
    return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor


def default_collator(processing_class: object) -> PaddingCollator:
    """Return the collator for rows of `encode_dataset`; it pads with the tokenizer's padding token if there is one.

    >>> default_collator(None)
    PaddingCollator(pad_token_id=0, side='right')
    """
    pad = getattr(processing_class, "pad_token_id", None)
    return PaddingCollator(pad_token_id=0 if pad is None else pad)
