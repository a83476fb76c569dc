"""Hashes that identify rows: which one to use when.

A row takes three forms on its way to the model, and a caller only ever has one of them. The hashes of the forms differ
because what may vary without making another row differs: column order, missing values and number formats in a raw row;
padding and the place in the batch in a batched row.

| form | the input alone | the input and its labels |
|---|---|---|
| a row as a mapping, raw or encoded | `row_hash` | `labelled_row_hash` |
| the rows of a batch, as the model receives it | `batch_hashes` | `labelled_batch_hashes` |

- `row_hash` (bytes) compares rows of data sets: forget against retain, requests against a split, the ledger's tags. A
  row with another label is still the same person's row, so labels do not count.
- `labelled_row_hash` (bytes) names what a fine-tune or a metric reads: the same input with another label trains
  another model. Cache keys are made of it.
- `batch_hashes` (integers) counts every tensor that reaches the model, `token_type_ids` and decoder inputs too, because
  each changes the Gram. The sum modulo 2^256 identifies a set of rows independently of order and batching, and adds
  and subtracts as the statistics do (`combine_rows`). It also seeds what is drawn for a row.
- `labelled_batch_hashes` (hexadecimal) names the stored outputs of a row at its label positions, so labels count.

A hash of one form never equals a hash of another: compare rows of the same form only. `row_hash` of a raw row and of
its encoded form differ as well, because the tokenizer stands between them.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from hf_unlearn.data.formats import MODEL_INPUTS, SECRET, Row
from hf_unlearn.models.fingerprint import hash_tensor
from hf_unlearn.models.forward import decoder_mask
from hf_unlearn.models.tasks import CONTENT_MASK, Batch

_MODULUS = 1 << 256
_NOT_HASHED = ("labels", "attention_mask", "position_ids", CONTENT_MASK)


# Rows as mappings


def row_hash(row: Row) -> bytes:
    """Return the SHA-256 of a row's model input or, for a raw row, of all its values.

    Equal rows have equal hashes whether their values are lists, arrays or tensors, in any float or integer precision,
    in any column order, and however their tokens are padded. Columns without a value do not count, because `datasets`
    fills them in where another row has one; labels of encoded rows do not count either, nor does the column `secret`,
    which says what of a row is to be forgotten.

    >>> row_hash({"text": "Ulm", "id": 3}) == row_hash({"id": 3, "text": "Ulm", "note": None})
    True
    >>> row_hash({"input_ids": [1, 2], "labels": [-100, 2]}) == row_hash({"input_ids": np.array([1, 2])})
    True
    >>> row_hash({"text": "Ulm"}) == row_hash({"text": "ulm"})
    False
    """
    digest = hashlib.sha256()
    inputs = [name for name in MODEL_INPUTS if row.get(name) is not None]
    for name in inputs or sorted(name for name, value in row.items() if value is not None and name != SECRET):
        value = _without_padding(row) if name == "input_ids" else row[name]
        digest.update(_value_bytes(value if inputs else _in_order(value)))
    return digest.digest()


def _without_padding(row: Row) -> Any:
    """Return the tokens of an encoded row where its attention mask, if it has one, is not 0."""
    tokens, mask = row["input_ids"], row.get("attention_mask")
    kept = None if mask is None else np.asarray(mask).astype(bool)
    if kept is None or kept.all() or kept.shape != np.shape(tokens):
        return tokens
    return np.asarray(tokens)[kept]


def labelled_row_hash(row: Row) -> bytes:
    """Return the hash of an encoded row's model input and labels: what a fine-tune learns from it."""
    return row_hash(row) + hashlib.sha256(_value_bytes(row.get("labels"))).digest()


def _in_order(value: Any) -> Any:
    """Sort the keys of the mappings in a value, such as messages, and drop keys without a value."""
    if isinstance(value, Mapping):
        return {name: _in_order(value[name]) for name in sorted(value) if value[name] is not None}
    return [_in_order(item) for item in value] if isinstance(value, list) else value


def _value_bytes(value: Any) -> bytes:
    """Return bytes that are equal for equal values, whatever container and precision their numbers come in."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()  # numpy has no bfloat16
    try:
        array = np.asarray(value)
    except ValueError:  # nested lists of unequal lengths
        return repr(value).encode()
    if array.dtype.kind == "f":
        array = array.astype(np.float32) + np.float32(0)  # the model reads float32 at most; turns -0.0 into 0.0
    elif array.dtype.kind in "biu":
        array = array.astype(np.int64)
    else:  # texts and messages
        return repr(value.tolist() if isinstance(value, np.ndarray) else value).encode()
    return repr(array.shape).encode() + array.tobytes()


# Rows of a batch


def batch_hashes(batch: Batch, encoder_decoder: bool = False) -> list[int]:
    """Return the SHA-256 of each row of a batch, over all its model inputs; labels and padding do not count.

    Args:
        batch: Tensors whose first dimension is the row; padding is where `attention_mask` is 0.
        encoder_decoder: The model has a decoder of its own. What the decoder reads then counts too: its inputs or,
            where the batch has none, the labels that they are made of.

    >>> import torch
    >>> left = {"input_ids": torch.tensor([[0, 5, 6]]), "attention_mask": torch.tensor([[0, 1, 1]])}
    >>> right = {"input_ids": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    >>> batch_hashes(left) == batch_hashes(right) == batch_hashes({"input_ids": torch.tensor([[5, 6]])})
    True
    """
    mask = _mask(batch)
    inputs = {name: tensor for name, tensor in batch.items() if name not in _NOT_HASHED}
    if not encoder_decoder:
        return _hash_rows(inputs, mask)
    answers = {name: tensor for name, tensor in inputs.items() if name.startswith("decoder_")}
    hashes = _hash_rows({name: tensor for name, tensor in inputs.items() if name not in answers}, mask)
    answers.pop("decoder_attention_mask", None)
    if not answers and "labels" in batch:
        answers = {"answer": batch["labels"]}
    if not answers:
        return hashes
    pairs = zip(hashes, _hash_rows(answers, decoder_mask(batch)), strict=True)
    return [int(hashlib.sha256(f"{source:064x}{answer:064x}".encode()).hexdigest(), 16) for source, answer in pairs]


def labelled_batch_hashes(batch: Batch) -> list[str]:
    """Return a hash of 64 hexadecimal digits for each row of a batch, of its inputs and labels without padding."""
    mask_BT = _mask(batch)
    hashes = []
    for row, input_hash in enumerate(batch_hashes(batch)):
        labels = _unpadded(batch["labels"][row], row, mask_BT)
        hashes.append(hashlib.sha256(f"{input_hash:064x}:{labels.cpu().tolist()}".encode()).hexdigest())
    return hashes


def _mask(batch: Batch) -> Tensor | None:
    """Return which positions of a batch of sequences are not padding, `[B, T]`."""
    mask = batch.get("attention_mask")
    return mask.bool() if mask is not None and mask.ndim == 2 else None


def _unpadded(values: Tensor, row: int, mask_BT: Tensor | None) -> Tensor:
    """Return the values of a row at the positions that are not padding; values that have no positions as they are."""
    if mask_BT is None or values.ndim == 0 or values.shape[0] != mask_BT.shape[1]:
        return values
    return values[mask_BT[row].to(values.device)]


def _hash_rows(tensors: Batch, mask_BT: Tensor | None) -> list[int]:
    hashes = []
    for row in range(len(next(iter(tensors.values())))):
        digest = hashlib.sha256()
        for name, tensor in sorted(tensors.items()):
            values = _unpadded(tensor[row], row, mask_BT)
            hash_tensor(digest, name, values.float() if values.is_floating_point() else values)
        hashes.append(int.from_bytes(digest.digest(), "big"))
    return hashes


# Sums of row hashes


def combine_rows(a: str, b: str, sign: int) -> str:
    """Return the fingerprint of the rows of `a` plus (`sign` 1) or minus (`sign` -1) the rows of `b`.

    >>> combine_rows(rows_to_text(5), rows_to_text(3), -1) == rows_to_text(2)
    True
    """
    return rows_to_text((int(a, 16) + sign * int(b, 16)) % _MODULUS)


def rows_to_text(total: int) -> str:
    """Return the 64 hexadecimal digits under which a sum of `batch_hashes` is stored."""
    return f"{total % _MODULUS:064x}"
