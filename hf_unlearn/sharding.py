"""Work split over the processes of a distributed run: rows, decompositions, sums, and who writes.

All of it is a plain call in a run of one process. Processes are those of `torch.distributed`, which accelerate and
torchrun set up; every process must make these calls in the same order.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from hf_unlearn.errors import ModelError, SettingsError

T = TypeVar("T")


def world() -> tuple[int, int]:
    """Rank of this process and number of processes; (0, 1) outside of a distributed run."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return world()[0] == 0


def own_indices(count: int, rank: int | None = None) -> range:
    """Which of `count` things a process, by default this one, works on: each belongs to one process."""
    own, size = world()
    return range(own if rank is None else rank, count, size)


def communication_device() -> torch.device:
    """Where tensors must be to be sent: the accelerator with its own backend, the CPU with gloo."""
    if world()[1] > 1 and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def sum_over_processes(tensors: Mapping[str, Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in place; names are the same everywhere."""
    if world()[1] == 1:
        return
    device = communication_device()
    for name in sorted(tensors):
        sent = tensors[name].to(device)
        dist.all_reduce(sent)
        tensors[name].copy_(sent)


def gather_rows(rows_NF: Tensor) -> Tensor:
    """The rows of all processes, whose numbers N may differ: `[N_0 + N_1 + ..., F]`."""
    _, size = world()
    counts = torch.empty(size, dtype=torch.long, device=rows_NF.device)
    dist.all_gather_into_tensor(counts, counts.new_tensor([len(rows_NF)]))
    found = counts.tolist()
    padded = torch.nn.functional.pad(rows_NF, (0, 0, 0, max(found) - len(rows_NF)))
    gathered = rows_NF.new_empty(size, *padded.shape)
    dist.all_gather_into_tensor(gathered.view(-1, rows_NF.shape[1]), padded.contiguous())
    return torch.cat([part[:count] for part, count in zip(gathered, found, strict=True)])


def gather(value: T) -> list[T]:
    """The value of each process, by rank. Values are plain Python objects or arrays, and come from this very run."""
    _, size = world()
    if size == 1:
        return [value]
    found: list[Any] = [None] * size
    dist.all_gather_object(found, value)
    return found


def from_owner(tensors: Sequence[Tensor], owner: int) -> None:
    """Overwrite the tensors by those of process `owner`, in place."""
    device = communication_device()
    for tensor in tensors:
        sent = tensor.to(device).contiguous()
        dist.broadcast(sent, owner)
        tensor.copy_(sent)


def share_out(sizes: Mapping[T, int]) -> dict[T, int]:
    """The process that each job goes to, largest first to the one with the least work; work is size cubed."""
    loads = [0] * world()[1]
    owner = {}
    for job in sorted(sizes, key=lambda job: (-sizes[job], str(job))):
        owner[job] = loads.index(min(loads))
        loads[owner[job]] += sizes[job] ** 3
    return owner


def wait_for_all() -> None:
    """Return once every process is here."""
    if world()[1] > 1:
        dist.barrier()


def leave() -> None:
    """End this process of a distributed run, successfully, once every one is here; does nothing in a single one.

    Without the interpreter's own end: with gloo, a DistributedDataParallel that is freed around its process group hung
    in one of about forty runs, in its destructor. Everything is written by now.
    """
    if world()[1] > 1:
        dist.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


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
