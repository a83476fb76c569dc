"""Content hashes that say which weights and which rows a statistics artifact was made from."""

import hashlib
import json
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from torch import Tensor, nn

from hf_unlearn.core.sharding import local_part, whole
from hf_unlearn.models.adapters import base_name, is_adapter


def hash_tensor(digest: Any, name: str, tensor: Tensor) -> None:
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
            hash_tensor(digest, name, tensor.float() if tensor.is_floating_point() else tensor)
    return digest.hexdigest()


def model_fingerprint(model: nn.Module) -> str:
    """Hash of all that a forward pass depends on: weights, adapters, precision and configuration."""
    adapters = {name: tensor for name, tensor in model.state_dict().items() if is_adapter(name)}
    config = getattr(model, "config", None)
    about = {} if config is None else config.to_dict()
    about = {k: v for k, v in about.items() if k not in ("_name_or_path", "transformers_version")}
    kind = f"{type(model).__name__} {next(model.parameters()).dtype} {json.dumps(about, sort_keys=True, default=str)}"
    return sha256(f"{weights_fingerprint(model)} {tensors_fingerprint(adapters)} {kind}".encode()).hexdigest()
