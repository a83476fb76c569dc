"""Hashes that identify rows."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from hf_unlearn.data.formats import MODEL_INPUTS, Row
from hf_unlearn.models.fingerprint import _add_tensor
from hf_unlearn.models.tasks import Batch

_MODULUS = 1 << 256


def row_hashes(batch: Mapping[str, Tensor], mask_BT: Tensor | None) -> list[int]:
    """One SHA-256 per row of model inputs; labels and padding do not count.

    Their sum modulo 2^256 names a set of rows whatever its order and batching, and adds and subtracts like the
    statistics themselves.
    """
    hashes = []
    inputs = {k: v for k, v in sorted(batch.items()) if k not in ("labels", "attention_mask", "position_ids")}
    for row in range(len(next(iter(inputs.values())))):
        digest = hashlib.sha256()
        for name, tensor in inputs.items():
            one = tensor[row]
            if mask_BT is not None and one.ndim >= 1 and one.shape[0] == mask_BT.shape[1]:
                one = one[mask_BT[row].to(one.device)]
            _add_tensor(digest, name, one.float() if one.is_floating_point() else one)
        hashes.append(int.from_bytes(digest.digest(), "big"))
    return hashes


def pair_hashes(batch: Mapping[str, Tensor], mask_BS: Tensor | None, mask_BT: Tensor | None) -> list[int]:
    """`row_hashes` of an encoder-decoder: of its inputs, and of what its decoder sees (of the labels, where not given).

    Both masks are those of the positions that count, the encoder's and the decoder's.
    """
    ignored = ("labels", "decoder_attention_mask")
    inputs = {k: v for k, v in batch.items() if not k.startswith("decoder_")}
    answers = {k: v for k, v in batch.items() if k.startswith("decoder_") and k not in ignored}
    if not answers and "labels" in batch:
        answers = {"answer": batch["labels"]}
    hashes = row_hashes(inputs, mask_BS)
    if not answers:
        return hashes
    pairs = zip(hashes, row_hashes(answers, mask_BT), strict=True)
    return [int(hashlib.sha256(f"{one:064x}{other:064x}".encode()).hexdigest(), 16) for one, other in pairs]


def combine_rows(a: str, b: str, sign: int) -> str:
    """Fingerprint of the rows of `a` plus (sign 1) or minus (sign -1) those of `b`, both as hexadecimal numbers."""
    return rows_to_text((int(a, 16) + sign * int(b, 16)) % _MODULUS)


def rows_to_text(total: int) -> str:
    """The 64 hexadecimal digits under which a sum of row hashes is stored."""
    return f"{total % _MODULUS:064x}"


def row_key(row: Row) -> bytes:
    """Hash of a row's model input (or, for raw rows, of its values), equal for equal rows."""
    digest = hashlib.sha256()
    names = [name for name in MODEL_INPUTS if name in row] or sorted(row)
    for name in names:
        digest.update(_value_key(row[name]))
    return digest.digest()


def labelled_row_key(row: Row) -> bytes:
    """Hash of a row's model input and labels: what a fine-tune learns from it."""
    return row_key(row) + hashlib.sha256(_value_key(row.get("labels"))).digest()


def _value_key(value: Any) -> bytes:
    """Bytes of a value, the same whatever container and precision a row's numbers come in."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()  # numpy has no bfloat16
    try:
        array = np.asarray(value)
    except ValueError:  # nested lists of unequal lengths
        return repr(value).encode()
    if array.dtype.kind == "f":
        array = array.astype(np.float32) + np.float32(0)  # a model reads no more of it; -0.0 is 0.0
    elif array.dtype.kind in "biu":
        array = array.astype(np.int64)
    else:
        # text, messages: compared as they are
        return repr(value.tolist() if isinstance(value, np.ndarray) else value).encode()
    return repr(array.shape).encode() + array.tobytes()


def batch_keys(inputs: Batch) -> list[str]:
    """One hexadecimal hash per row, of its inputs and labels without padding."""
    mask = inputs.get("attention_mask")
    mask_BT = mask.bool() if mask is not None and mask.ndim == 2 else None
    keys = []
    for row, inputs_hash in enumerate(row_hashes(inputs, mask_BT)):
        labels = inputs["labels"][row]
        if mask_BT is not None and labels.ndim == 1 and len(labels) == mask_BT.shape[1]:
            labels = labels[mask_BT[row].to(labels.device)]
        content = f"{inputs_hash:064x}:{labels.cpu().tolist()}"
        keys.append(hashlib.sha256(content.encode()).hexdigest())
    return keys


def row_identity(row: Row) -> str:
    """`data.row_key` of a row as a file has it: columns without a value and the order within messages don't count."""
    return row_key({name: _ordered(value) for name, value in row.items() if value is not None}).hex()


def _ordered(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _ordered(value[name]) for name in sorted(value) if value[name] is not None}
    return [_ordered(item) for item in value] if isinstance(value, list) else value
