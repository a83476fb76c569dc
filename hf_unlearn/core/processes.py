"""Work shared by the processes of a distributed run: which rows, which decompositions, sums, and who writes.

Processes are those of `torch.distributed`, which accelerate and torchrun set up. In a run of one process every call
works without communication. Functions named as verbs that gather, sum, send or wait are collective: every process must
call them, in the same order. How a model's weights are split over processes is in `sharding`.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def world() -> tuple[int, int]:
    """Return the rank of this process and the number of processes; (0, 1) outside a distributed run."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def is_main() -> bool:
    """Return whether this process is the one that writes and prints."""
    return world()[0] == 0


def own_indices(count: int, rank: int | None = None) -> range:
    """Return which of `count` items a process, by default this one, works on; each item belongs to one process.

    >>> list(own_indices(3))
    [0, 1, 2]
    """
    this_rank, size = world()
    return range(this_rank if rank is None else rank, count, size)


def communication_device() -> torch.device:
    """Return the device that tensors must be on to be sent: the GPU with NCCL, the CPU with gloo."""
    if world()[1] > 1 and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def sum_over_processes(tensors: Mapping[str, Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in place; every process has the same names."""
    if world()[1] == 1:
        return
    device = communication_device()
    for name in sorted(tensors):
        sent = tensors[name].to(device)
        dist.all_reduce(sent)
        tensors[name].copy_(sent)


def gather_rows(rows_NF: Tensor) -> Tensor:
    """Return the rows of all processes, whose numbers N may differ: `[N_0 + N_1 + ..., F]`."""
    _, size = world()
    counts = torch.empty(size, dtype=torch.long, device=rows_NF.device)
    dist.all_gather_into_tensor(counts, counts.new_tensor([len(rows_NF)]))
    lengths = counts.tolist()
    padded = torch.nn.functional.pad(rows_NF, (0, 0, 0, max(lengths) - len(rows_NF)))
    gathered = rows_NF.new_empty(size, *padded.shape)
    dist.all_gather_into_tensor(gathered.view(-1, rows_NF.shape[1]), padded.contiguous())
    return torch.cat([rows[:length] for rows, length in zip(gathered, lengths, strict=True)])


def gather(value: T) -> list[T]:
    """Return the value of each process, by rank.

    Values are plain Python objects or arrays. They travel as pickles, but only between processes of this run.
    """
    _, size = world()
    if size == 1:
        return [value]
    values: list[T | None] = [None] * size
    dist.all_gather_object(values, value)
    return cast(list[T], values)


def from_owner(tensors: Sequence[Tensor], owner: int) -> None:
    """Overwrite the tensors with those of process `owner`, in place."""
    device = communication_device()
    for tensor in tensors:
        sent = tensor.to(device).contiguous()
        dist.broadcast(sent, owner)
        tensor.copy_(sent)


def share_out(sizes: Mapping[T, int]) -> dict[T, int]:
    """Return the process of each job: the largest job first, to the process with the least work; work is size cubed.

    >>> share_out({"a": 4, "b": 8})
    {'b': 0, 'a': 0}
    """
    loads = [0] * world()[1]
    owner = {}
    for job in sorted(sizes, key=lambda job: (-sizes[job], str(job))):
        owner[job] = loads.index(min(loads))
        loads[owner[job]] += sizes[job] ** 3
    return owner


def wait_for_all() -> None:
    """Return once every process has called this."""
    if world()[1] > 1:
        dist.barrier()


def leave() -> None:
    """End this process of a distributed run successfully once every process is here; do nothing in a single process.

    The interpreter's own shutdown is skipped: with gloo, the destructor of a DistributedDataParallel that was freed
    together with its process group hung in one of about forty runs. All files are written at this point.
    """
    if world()[1] > 1:
        dist.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
