"""Padding as a model expects it, whatever a batch was padded with.

The attention mask says where padding is. Some models look at the ids instead: classifiers on decoders read the position
of the last id that is not the configuration's `pad_token_id` (and refuse batches without one), classifiers on
encoder-decoders count end tokens, and RoBERTa counts positions from the ids.

Shapes: B rows, T positions.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from hf_unlearn.errors import DataError
from hf_unlearn.models.adapters import without_wrapper
from hf_unlearn.models.tasks import Batch, task_of, vocabulary_size


@contextmanager
def own_padding(model: nn.Module, inputs: Batch) -> Iterator[Batch]:
    """Yield the batch with the model's own padding id at padded positions.

    A classifier without a padding id gets one inside this scope that is the last token of none of the rows, so that
    each row is read at its last position, as it is alone.

    >>> batch = {"input_ids": torch.tensor([[5, 9]]), "attention_mask": torch.tensor([[1, 0]])}
    >>> with own_padding(nn.Linear(2, 2), batch) as padded:  # a model without a configuration
    ...     padded is batch
    True

    Raises:
        DataError: The classifier has no padding id, and every id is the last token of a row.
    """
    ids_BT, mask_BT = inputs.get("input_ids"), inputs.get("attention_mask")
    config = getattr(without_wrapper(getattr(model, "module", model)), "config", None)
    if ids_BT is None or config is None or ids_BT.ndim != 2:
        yield inputs
        return
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    rows, pad = vocabulary_size(model), getattr(inner, "pad_token_id", None)
    if mask_BT is not None and mask_BT.shape != ids_BT.shape:
        mask_BT = None
    if isinstance(pad, int) and 0 <= pad < (rows or 0):
        yield {**inputs, "input_ids": ids_BT.masked_fill(~mask_BT.bool(), pad)} if mask_BT is not None else inputs
    elif task_of(model) != "text-classification":
        yield inputs
    else:
        seen_BT = torch.ones_like(ids_BT, dtype=torch.bool) if mask_BT is None else mask_BT.bool()
        unused = _unused_id(ids_BT, seen_BT, rows or 0)
        inner.pad_token_id = unused
        try:
            yield {**inputs, "input_ids": ids_BT.masked_fill(~seen_BT, unused)}
        finally:
            inner.pad_token_id = pad


def has_values(tensor: Tensor) -> bool:
    """Return whether a tensor has values; those of an estimate have a shape only.

    >>> has_values(torch.zeros(2)), has_values(torch.zeros(2, device="meta"))
    (True, False)
    """
    return not (getattr(tensor, "is_meta", False) or isinstance(tensor, FakeTensor))


def _unused_id(ids_BT: Tensor, seen_BT: Tensor, rows: int) -> int:
    """Return an id that is the last seen token of none of the rows."""
    if not has_values(ids_BT):
        return 0
    places_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    last_B = (places_T * seen_BT).argmax(1, keepdim=True)
    used = set(ids_BT.gather(1, last_B).flatten().tolist())
    unused = next((token for token in range(rows) if token not in used), None)
    if unused is None:
        raise DataError(
            "the model's configuration has no pad_token_id, and a batch ends with every token that there is; set "
            "model.config.pad_token_id, or use smaller batches"
        )
    return unused
