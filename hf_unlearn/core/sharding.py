"""Sharded models: FSDP2 and DeepSpeed ZeRO."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_unlearn.errors import ModelError, SettingsError


def sharding_of(accelerator: Any) -> str:
    """How a run's weights lie on its processes: `none` (each has all), `fsdp2`, or `zero1` to `zero3` (DeepSpeed)."""
    state = accelerator.state
    if (plugin := getattr(state, "deepspeed_plugin", None)) is not None:
        return f"zero{plugin.zero_stage}" if plugin.zero_stage else "none"
    plugin = getattr(state, "fsdp_plugin", None)
    return f"fsdp{plugin.fsdp_version}" if plugin is not None else "none"


def check_sharding(accelerator: Any, model: nn.Module) -> None:
    """Raise `SettingsError` on sharding under which a constraint could not be kept; `model` may be sharded already."""
    kind = sharding_of(accelerator)
    if kind == "fsdp2" and any(isinstance(module, FSDPModule) for module in model.modules()):
        accelerator.state.fsdp_plugin.auto_wrap_policy = None  # it looks for names that FSDP has changed
    if kind == "fsdp1":
        raise SettingsError("FSDP version 1 cuts weights in the middle of a matrix; set fsdp_version: 2")
    if kind == "fsdp2" and accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
        raise SettingsError(
            "fsdp_cpu_ram_efficient_loading leaves all processes but one without the original weights, which are the "
            "anchor; set it to false"
        )


def shard_on_cpu(accelerator: Any, plugin_settings: Mapping[str, Any] | None) -> None:
    """Turn FSDP on in a distributed run on CPUs whose settings or launcher ask for it."""
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
    """Scope in which `from_pretrained` gives every process whole weights, under ZeRO-3 too.

    Statistics and anchors come before weights are cut up; afterwards only the engine can put them together.
    """
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference


def local_part(tensor: Tensor) -> Tensor:
    """This process's shard of a sharded tensor; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one (a collective call); any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_sharded(model: nn.Module) -> bool:
    """Whether a process has only parts of the model's weights or gradients (FSDP2, DeepSpeed)."""
    marks = ("ds_id", "_hp_mapping")  # of ZeRO-3 and of ZeRO-1 and -2
    return any(isinstance(p, DTensor) or any(hasattr(p, mark) for mark in marks) for p in model.parameters())


def require_whole(model: nn.Module, what: str) -> None:
    """Raise `ModelError` where `what` would see parts of a gradient, or a mean over the processes' rows."""
    if is_sharded(model):
        raise ModelError(f"{what} needs whole gradients, and the model is sharded over processes; load the saved one")
