"""Content hashes that say which weights and which rows a statistics artifact was made from."""

import hashlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor, nn

from hf_unlearn.adapters import base_name, is_adapter
from hf_unlearn.sharding import local_part, whole

_MODULUS = 1 << 256
_PACKAGES = ("hf-unlearn", "torch", "transformers", "datasets", "accelerate", "peft")


def _add_tensor(digest: Any, name: str, tensor: Tensor) -> None:
    digest.update(f"{name}:{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 over parameters and persistent buffers, by name, with floating values as float32.

    A bf16 checkpoint has the same fingerprint loaded as bf16 or as float32, and with or without PEFT adapters; tied
    weights count once.
    """
    return state_fingerprint(model.state_dict())


def state_fingerprint(state: Mapping[str, Tensor]) -> str:
    """`weights_fingerprint` of the model that has this state dict."""
    return tensors_fingerprint({base_name(name): tensor for name, tensor in state.items() if not is_adapter(name)})


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over tensors by name, with floating values as float32; of several in one place the first counts."""
    digest = hashlib.sha256()
    seen: set[int | str] = set()
    for name, tensor in sorted(tensors.items()):
        place = local_part(tensor).data_ptr() or name  # an empty shard has no place
        if place not in seen or tensor.numel() == 0:
            seen.add(place)
            tensor = whole(tensor)
            _add_tensor(digest, name, tensor.float() if tensor.is_floating_point() else tensor)
    return digest.hexdigest()


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


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that a result depends on."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> str:
    """One line on what a measurement ran on, for reports."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"CPU, {torch.get_num_threads()} threads"
