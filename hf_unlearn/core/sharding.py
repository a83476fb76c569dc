"""Models whose weights are split over processes: FSDP2 and DeepSpeed ZeRO.

Constraints need complete weight matrices and complete gradients. This module tells how a run is sharded, refuses
sharding under which a constraint could not hold, and puts a shard together (`whole`) or takes this process's
(`local_part`). Which process has which part of a weight is in `constraints.layouts`.
"""

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor, nn

from hf_unlearn.errors import ModelError, SettingsError

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


def sharding_of(accelerator: "Accelerator") -> str:
    """Return how a run's weights are sharded: `none`, `fsdp1`, `fsdp2`, or `zero1` to `zero3` (DeepSpeed)."""
    state = accelerator.state
    if (plugin := getattr(state, "deepspeed_plugin", None)) is not None:
        return f"zero{plugin.zero_stage}" if plugin.zero_stage else "none"
    plugin = getattr(state, "fsdp_plugin", None)
    return f"fsdp{plugin.fsdp_version}" if plugin is not None else "none"


def check_sharding(accelerator: "Accelerator", model: nn.Module) -> None:
    """Raise `SettingsError` if a constraint could not hold under the run's sharding; `model` may be sharded already."""
    sharding = sharding_of(accelerator)
    if sharding == "fsdp2" and any(is_fsdp_module(module) for module in model.modules()):
        accelerator.state.fsdp_plugin.auto_wrap_policy = None  # it looks for names that FSDP has changed
    if sharding == "fsdp1":
        raise SettingsError("FSDP version 1 cuts weights in the middle of a matrix; set fsdp_version: 2")
    if sharding == "fsdp2" and accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
        raise SettingsError(
            "fsdp_cpu_ram_efficient_loading leaves all processes except one without the original weights, which are "
            "the anchor; set it to false"
        )


def shard_on_cpu(accelerator: "Accelerator", plugin_settings: Mapping[str, object] | None) -> None:
    """Turn FSDP on in a distributed run on CPUs if the settings or the launcher ask for it."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    asked = plugin_settings is not None or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    state = accelerator.state
    if not asked or state.distributed_type != DistributedType.MULTI_CPU:
        return
    state.fsdp_plugin = FullyShardedDataParallelPlugin(**(plugin_settings or {}))
    if state.mixed_precision != "no":
        state.fsdp_plugin.set_mixed_precision(state.mixed_precision)
    state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP


@contextmanager
def loaded_whole() -> Iterator[None]:
    """Make `from_pretrained` load the complete weights on every process inside this scope, under ZeRO-3 too.

    Statistics and anchors are made before weights are sharded; afterwards only the engine can put them together.
    """
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference


def is_dtensor(tensor: object) -> "TypeGuard[DTensor]":
    """Return whether a tensor is sharded by torch, as a DTensor.

    The library of sharded tensors takes a second to import, so it is not imported to ask: a DTensor exists only where
    something else has imported it.

    >>> import torch
    >>> is_dtensor(torch.zeros(2))
    False
    """
    library = sys.modules.get("torch.distributed.tensor")
    return library is not None and isinstance(tensor, library.DTensor)


def is_fsdp_module(module: nn.Module) -> "TypeGuard[FSDPModule]":
    """Return whether a module is managed by FSDP2; as `is_dtensor`, without importing FSDP."""
    library = sys.modules.get("torch.distributed.fsdp")
    return library is not None and isinstance(module, library.FSDPModule)


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's shard of a sharded tensor, or the tensor itself if it is not sharded."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return all of a sharded tensor (a collective call), or the tensor itself if it is not sharded."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def is_sharded(model: nn.Module) -> bool:
    """Return whether each process has only a part of the model's weights or gradients (FSDP2, DeepSpeed)."""
    attributes = ("ds_id", "_hp_mapping")  # set by ZeRO-3, and by ZeRO-1 and -2
    return any(is_dtensor(p) or any(hasattr(p, name) for name in attributes) for p in model.parameters())


def require_whole(model: nn.Module, what: str) -> None:
    """Raise `ModelError` if `what` would see part of a gradient, or the mean of one over the processes' rows."""
    if is_sharded(model):
        raise ModelError(
            f"{what} needs complete gradients, but the model is sharded over processes; load the saved model instead"
        )
