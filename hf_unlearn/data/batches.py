"""Batches of encoded rows: padding, and the share of each process."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from hf_unlearn.core.processes import own_indices
from hf_unlearn.data.encoding import RowStream
from hf_unlearn.data.formats import Row
from hf_unlearn.models.tasks import IGNORED


def take(rows: Any, max_rows: int | None) -> Any:
    """The first rows of encoded ones, of a stream too; all of them with None."""
    if isinstance(rows, RowStream):
        return RowStream(rows.dataset, rows.encode, max_rows)
    return rows if max_rows is None or max_rows >= len(rows) else Subset(rows, range(max_rows))


def own_batches(rows: Any, collator: Callable[[Sequence[Row]], Any], batch_size: int) -> Iterator[tuple[Any, bool]]:
    """Batches of this process's share of encoded rows, each with whether it counts.

    Every process gets the same number of batches, for a sharded model needs them all at every forward pass; those that
    only fill up do not count.
    """
    generator = torch.Generator()  # its own: a loader draws a seed even where it shuffles nothing
    own = () if isinstance(rows, RowStream) else own_indices(len(rows))
    share = rows if isinstance(rows, RowStream) else Subset(rows, own or range(1))
    made, batch = 0, None
    for batch in DataLoader(share, batch_size=batch_size, collate_fn=collator, generator=generator):
        made += 1
        yield batch, bool(own) or isinstance(rows, RowStream)
    total = rows.total if isinstance(rows, RowStream) else len(rows)
    for _ in range(len(range(0, len(own_indices(total, 0)), batch_size)) - made):  # process 0 has the most rows
        yield collator([rows.first()]) if batch is None else batch, False


@dataclass(frozen=True)
class PaddingCollator:
    """Stack rows into a batch, padding token sequences on the right (on the left with `side="left"`).

    Columns of text and other answers are left out, `label` is renamed to `labels`; any other column reaches the model.
    """

    pad_token_id: int = 0
    side: str = "right"

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        batch = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            if isinstance(values[0], (str, Mapping)) or values[0] is None:
                continue
            tensors = [_tensor(value) for value in values]
            batch["labels" if name in ("label", "label_ids") else name] = self._stack(name, tensors)
        if "input_ids" in batch and "attention_mask" not in batch:
            batch["attention_mask"] = self._stack(
                "attention_mask", [torch.ones(len(r["input_ids"])) for r in rows]
            ).long()
        return batch

    def _stack(self, name: str, tensors: list[Tensor]) -> Tensor:
        if tensors[0].ndim != 1 or len({len(t) for t in tensors}) == 1:
            return torch.stack(tensors)
        value = {"input_ids": self.pad_token_id, "labels": IGNORED}.get(name, 0)
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=self.side)


def _tensor(value: Any) -> Tensor:
    """As torch.tensor, but quick for long nested lists: Python's floats become the default dtype."""
    if not isinstance(value, (list, float)):
        return torch.as_tensor(value)
    tensor = torch.as_tensor(np.asarray(value))
    return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor


def default_collator(processing_class: Any) -> PaddingCollator:
    """The collator for rows of `encode_dataset`, padding with the tokenizer's own token where it has one."""
    pad = getattr(processing_class, "pad_token_id", None)
    return PaddingCollator(pad_token_id=0 if pad is None else pad)
