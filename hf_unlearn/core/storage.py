"""Where large tensors are kept between uses: on the device, in main memory, in a memory-mapped file, or in shards."""

import os
import tempfile
from dataclasses import dataclass
from functools import cache

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from hf_unlearn.core.processes import communication_device, world
from hf_unlearn.core.sharding import is_dtensor, whole
from hf_unlearn.errors import SettingsError

PLACES = ("device", "cpu", "disk", "shards")


@dataclass(frozen=True)
class Storage:
    """A place to keep tensors in; `fetch` reads them.

    >>> kept = Storage("disk").keep(torch.ones(2))
    >>> fetch(kept, "cpu")
    tensor([1., 1.])

    Attributes:
        place: `device`: the tensor stays on its device; `cpu`: main memory; `disk`: a memory-mapped safetensors file in
            the folder for temporary files (TMPDIR), which takes disk space until the tensor is freed or the process
            ends; `shards`: each process has a share of the rows, gathered at each use.

    Raises:
        SettingsError: The place is unknown.
    """

    place: str = "device"

    def __post_init__(self) -> None:
        if self.place not in PLACES:
            raise SettingsError(f"statistics can be kept on {', '.join(PLACES)}, not {self.place!r}")

    def keep(self, tensor: Tensor) -> Tensor:
        """Return the same values in this place; for `shards` a collective call."""
        if self.place == "shards":
            return shard(tensor)
        if self.place == "device":
            return tensor
        tensor = whole(tensor).cpu()
        return _mapped(tensor) if self.place == "disk" else tensor


def fetch(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return all values of a kept tensor on `device`; for a tensor in shards a collective call."""
    return whole(tensor).to(device)


def shard(tensor: Tensor) -> Tensor:
    """Keep only this process's share of the rows of a tensor that every process has."""
    if world()[1] == 1 or is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(tensor.to(communication_device()), world_mesh(), [Shard(0)], src_data_rank=None)


def own_rows(count: int) -> slice:
    """Return which of `count` rows this process has of a tensor in shards."""
    rank, processes = world()
    size = -(-count // processes)
    return slice(min(rank * size, count), min((rank + 1) * size, count))


def from_own_rows(rows: Tensor, count: int) -> Tensor:
    """Return the tensor of `count` rows in shards of which this process has `rows`."""
    if world()[1] == 1:
        return rows
    from torch.distributed.tensor import DTensor, Shard

    shape = torch.Size((count, *rows.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(rows, world_mesh(), [Shard(0)], run_check=False, shape=shape, stride=stride)


@cache
def world_mesh() -> DeviceMesh:
    """Return the one-dimensional mesh of all processes."""
    return init_device_mesh(communication_device().type, (world()[1],))


def _mapped(tensor: Tensor) -> Tensor:
    """Return the tensor as a view of a file that no longer has a name."""
    handle, path = tempfile.mkstemp(prefix="hf_unlearn-", suffix=".safetensors")
    os.close(handle)
    try:
        save_file({"tensor": tensor.contiguous()}, path)
        return load_file(path)["tensor"]
    finally:
        os.unlink(path)  # the mapping keeps the content until the tensor is freed
