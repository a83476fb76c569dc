"""Content hashes of models, which identify the weights that statistics, caches and stored outputs were made from.

Hashes of rows are in `data.row_identity`.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from hf_unlearn.core.sharding import local_part, whole
from hf_unlearn.models.adapters import base_name, is_adapter

if TYPE_CHECKING:
    from hashlib import _Hash


def hash_tensor(digest: "_Hash", name: str, tensor: Tensor) -> None:
    """Add a tensor's name, shape and values to a hash."""
    digest.update(f"{name}:{tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())


def weights_fingerprint(model: nn.Module) -> str:
    """Return the SHA-256 over parameters and persistent buffers, by name, with floating-point values as float32.

    A bfloat16 checkpoint has the same fingerprint whether it is loaded as bfloat16 or as float32, and with or without
    PEFT adapters. Tied weights count once.

    >>> model = nn.Linear(2, 2).bfloat16()
    >>> fingerprint = weights_fingerprint(model)
    >>> len(fingerprint), weights_fingerprint(model.float()) == fingerprint
    (64, True)
    >>> _ = nn.init.zeros_(model.bias)
    >>> weights_fingerprint(model) == fingerprint
    False
    """
    return state_fingerprint(model.state_dict())


def state_fingerprint(state: Mapping[str, Tensor]) -> str:
    """Return the `weights_fingerprint` of a model with this state dict."""
    return tensors_fingerprint({base_name(name): tensor for name, tensor in state.items() if not is_adapter(name)})


def tensors_fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 over tensors by name, with floating-point values as float32.

    Of several tensors that share memory, only the first by name counts.
    """
    digest = hashlib.sha256()
    seen: set[int | str] = set()
    for name, tensor in sorted(tensors.items()):
        address = local_part(tensor).data_ptr() or name  # an empty shard has no address
        if address not in seen or tensor.numel() == 0:
            seen.add(address)
            tensor = whole(tensor)
            hash_tensor(digest, name, tensor.float() if tensor.is_floating_point() else tensor)
    return digest.hexdigest()


def model_fingerprint(model: nn.Module) -> str:
    """Return a hash of everything that a forward pass depends on: weights, adapters, precision and configuration."""
    adapters = {name: tensor for name, tensor in model.state_dict().items() if is_adapter(name)}
    config = getattr(model, "config", None)
    settings = {} if config is None else config.to_dict()
    settings = {k: v for k, v in settings.items() if k not in ("_name_or_path", "transformers_version")}
    settings_text = json.dumps(settings, sort_keys=True, default=str)
    architecture = f"{type(model).__name__} {next(model.parameters()).dtype} {settings_text}"
    content = f"{weights_fingerprint(model)} {tensors_fingerprint(adapters)} {architecture}"
    return hashlib.sha256(content.encode()).hexdigest()
