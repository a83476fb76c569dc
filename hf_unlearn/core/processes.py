"""Work split over the processes of a distributed run: rows, decompositions, sums, and who writes.

All of it is a plain call in a run of one process. Processes are those of `torch.distributed`, which accelerate and
torchrun set up; every process must make these calls in the same order.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

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
