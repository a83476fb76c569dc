"""How a trained parameter lies on the processes of a run: whole on each, in shards of rows, or in flat pieces.

Elementwise work (copies, norms, interpolation) is done on the *local* values, those that this process holds. A
constraint needs the *matrix*, which has the parameter's shape: a plain tensor, or a DTensor whose local part is this
process's.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from hf_unlearn.core.sharding import whole
from hf_unlearn.errors import ModelError


class Whole:
    """Every process holds all of the parameter: one process, or data parallel (DDP)."""

    group: Any = None
    """The processes whose local values add up to the parameter; None where each has all of it."""

    def __init__(self, parameter: nn.Parameter):
        self.parameter = parameter

    def read(self) -> Tensor:
        """The local values; they may share memory with the parameter."""
        return self.parameter.detach()

    def write(self, local: Tensor) -> None:
        """Give the parameter these local values."""
        own = self.read()
        if own.data_ptr() != local.data_ptr() or own.dtype != local.dtype:
            own.copy_(local)

    def exchange(self, local: Tensor) -> Tensor:
        """Give the parameter these local values and return those it had; here without a copy."""
        before = self.parameter.data
        self.parameter.data = local
        return before

    def gradient(self) -> Tensor | None:
        """The local values of the gradient; None where there is none."""
        return self.parameter.grad

    def set_gradient(self, local: Tensor) -> None:
        """Give the gradient these local values."""
        gradient = self.gradient()
        assert gradient is not None
        gradient.copy_(local)

    def matrix(self, local: Tensor) -> Tensor:
        """Local values in the parameter's shape, as one tensor of all processes."""
        return local

    def local(self, matrix: Tensor) -> Tensor:
        """This process's values of a tensor of the parameter's shape; the inverse of `matrix`."""
        return matrix


class Rows(Whole):
    """A DTensor, sharded along one dimension: FSDP2, with or without replicas (HSDP)."""

    parameter: Any

    def __init__(self, parameter: nn.Parameter):
        super().__init__(parameter)
        if sum(not kind.is_replicate() for kind in self.parameter.placements) > 1 or any(
            type(kind) is not Shard for kind in self.parameter.placements if not kind.is_replicate()
        ):
            raise ModelError(
                f"a parameter of shape {tuple(parameter.shape)} is sharded as {self.parameter.placements}; only "
                "sharding along one dimension (FSDP2, HSDP) is handled, not together with tensor parallelism"
            )

        self.group = group_of(self.parameter)

    def read(self) -> Tensor:
        return self.parameter.detach().to_local()

    def exchange(self, local: Tensor) -> Tensor:
        before = self.read().clone()  # FSDP gathers from memory of its own: the values must move, not the pointer
        self.write(local)
        return before

    def gradient(self) -> Tensor | None:
        return None if self.parameter.grad is None else self.parameter.grad.to_local()

    def matrix(self, local: Tensor) -> Tensor:
        like = self.parameter
        return DTensor.from_local(
            local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )

    def local(self, matrix: Tensor) -> Tensor:
        if isinstance(matrix, DTensor):
            return matrix.to_local()
        mesh, kinds = self.parameter.device_mesh, self.parameter.placements
        for dimension, kind in enumerate(kinds):
            if isinstance(kind, Shard):
                count, own = mesh.size(dimension), mesh.get_local_rank(dimension)
                pieces = matrix.chunk(count, kind.dim)
                empty = matrix.narrow(kind.dim, 0, 0)
                matrix = pieces[own] if own < len(pieces) else empty
        return matrix.to(self.read().device)


class Pieces(Whole):
    """Equal pieces of the flattened parameter: DeepSpeed ZeRO-3. Values are those of the float32 master weights.

    Where the processes divide the rows, a piece is a shard of rows and the matrix a DTensor; elsewhere the matrix is
    gathered on every process.
    """

    parameter: Any

    def __init__(self, parameter: nn.Parameter):
        super().__init__(parameter)
        self.group = self.parameter.ds_process_group
        self.rank, self.count = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.size = self.parameter.ds_tensor.ds_numel
        self.own = max(0, min(self.size, self.parameter.ds_numel - self.rank * self.size))  # the rest is padding
        first = self.parameter.ds_shape[0]
        self.by_rows = first % self.count == 0 and self.size * self.count == self.parameter.ds_numel

    def read(self) -> Tensor:
        return self.parameter._z3_optimizer.get_local_fp32_param(self.parameter).detach()[: self.own]

    def write(self, local: Tensor) -> None:
        padded = torch.nn.functional.pad(local, (0, self.size - self.own))
        self.parameter._z3_optimizer.set_local_hp_param(padded, self.parameter)
        self.parameter.ds_tensor.data[: self.own].copy_(local)  # what forward passes gather

    def exchange(self, local: Tensor) -> Tensor:
        before = self.read().clone()
        self.write(local)
        return before

    def gradient(self) -> Tensor | None:
        return self.parameter._z3_optimizer.get_local_fp32_grad_for_param(self.parameter)[: self.own]

    def set_gradient(self, local: Tensor) -> None:
        padded = torch.nn.functional.pad(local, (0, self.size - self.own))
        self.parameter._z3_optimizer.set_local_grad_for_param(padded, self.parameter)

    def matrix(self, local: Tensor) -> Tensor:
        shape = self.parameter.ds_shape
        if self.by_rows:
            mesh = _mesh_of(self.group, local.device.type)
            rows = local.view(shape[0] // self.count, *shape[1:])
            return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False)
        gathered = local.new_empty(self.count * self.size)
        piece = torch.nn.functional.pad(local, (0, self.size - self.own))
        dist.all_gather_into_tensor(gathered, piece, group=self.group)
        return gathered[: self.parameter.ds_numel].view(shape)

    def local(self, matrix: Tensor) -> Tensor:
        if isinstance(matrix, DTensor):
            return matrix.to_local().reshape(-1)
        start = self.rank * self.size
        return matrix.reshape(-1)[start : start + self.own].to(self.parameter.ds_tensor.device)


class Stretches(Whole):
    """A stretch of the flattened parameter, or nothing of it: DeepSpeed ZeRO-1 and ZeRO-2.

    They cut the float32 master weights of all parameters together into equal pieces. Values are those of the master
    weights; the matrix is gathered on every process.
    """

    parameter: Any

    def __init__(self, parameter: nn.Parameter):
        super().__init__(parameter)
        self.group, self.master = self.parameter._dp_group, self.parameter._hp_mapping
        self.start = self.master.lp_fragment_address.start if self.master is not None else 0
        self.own = self.master.lp_fragment_address.numel if self.master is not None else 0

    def read(self) -> Tensor:
        if self.master is None:
            return torch.empty(0, device=self.parameter.device)
        return self.master.get_hp_fragment().detach()

    def exchange(self, local: Tensor) -> Tensor:
        before = self.read().clone()
        self.write(local)
        return before

    def gradient(self) -> Tensor | None:
        if self.master is None:
            return torch.empty(0, device=self.parameter.device)
        gradient = self.master.get_lp_grad_fragment(self.parameter._index_in_param_group).view(-1)
        return gradient if len(gradient) == self.own else gradient[self.start : self.start + self.own]

    def matrix(self, local: Tensor) -> Tensor:
        full = torch.zeros(self.parameter.numel(), device=local.device)  # float32: gradients may have fewer bits
        full[self.start : self.start + self.own] = local
        dist.all_reduce(full, group=self.group)
        return full.view(self.parameter.shape)

    def local(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(-1)[self.start : self.start + self.own]


def placement_of(parameter: nn.Parameter) -> Whole:
    """The placement of a parameter; asked for at each use, because sharding replaces parameter objects."""
    if isinstance(parameter, DTensor):
        return Rows(parameter)
    if hasattr(parameter, "_hp_mapping"):
        return Stretches(parameter)
    return Pieces(parameter) if hasattr(parameter, "ds_tensor") else Whole(parameter)


def whole_parameter(parameter: nn.Parameter) -> Tensor:
    """All of a parameter on every process, trained or frozen (a collective call where it is sharded)."""
    if hasattr(parameter, "ds_tensor"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return whole(parameter.detach())


def apply_right(factor: Callable[[Tensor], Tensor], matrix_OI: Tensor) -> Tensor:
    """`factor(matrix_OI)`, for a factor that acts on each row.

    Of a DTensor in shards of rows that takes no communication. One in shards of columns is first laid out by rows, and
    brought back after: an all-to-all of `O I / P` numbers a process each way, less than any sum over shards.
    """
    if not isinstance(matrix_OI, DTensor):
        return factor(matrix_OI)
    home = matrix_OI.placements
    rows = tuple(Shard(0) if kind == Shard(1) else kind for kind in home)
    by_rows = matrix_OI.redistribute(placements=rows) if rows != home else matrix_OI
    found = factor(by_rows.to_local())
    shape = (matrix_OI.shape[0], found.shape[1])
    result = DTensor.from_local(
        found, matrix_OI.device_mesh, rows, run_check=False, shape=torch.Size(shape), stride=(shape[1], 1)
    )
    return result.redistribute(placements=home) if rows != home else result


def turned(matrix: Tensor) -> Tensor:
    """The transpose of a matrix, or of each of a stack."""
    return matrix.T if matrix.ndim == 2 else matrix.mT


def local_squares(tensors: Sequence[Tensor]) -> Tensor:
    """`[len(tensors)]`: the sum of squares of the local part of each, in float32."""
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return torch.stack(torch._foreach_norm(parts, 2, dtype=torch.float32)).square()


def group_of(matrix: Tensor) -> Any:
    """The processes that have the other shards of a DTensor; None for a plain tensor, which is whole."""
    if isinstance(matrix, DTensor):
        for dimension, kind in enumerate(matrix.placements):
            if isinstance(kind, Shard):
                return matrix.device_mesh.get_group(dimension)
    return None


def sum_over_shards(values_N: Tensor, groups: Sequence[Any]) -> Tensor:
    """Add each value up over its group of processes, by one all-reduce for all; where the group is None it stays."""
    found = {id(group): group for group in groups if group is not None}
    if not found:
        return values_N
    if len(found) > 1:
        raise ModelError(f"trained parameters are sharded over {len(found)} different groups of processes; use one")
    sharded_N = torch.tensor([group is not None for group in groups], device=values_N.device)
    total_N = torch.where(sharded_N, values_N, 0)
    dist.all_reduce(total_N, group=next(iter(found.values())))
    return torch.where(sharded_N, total_N, values_N)


def settle(model: nn.Module) -> None:
    """Let what FSDP keeps gathered after a forward pass without gradients go back to its shards."""
    if dist.is_initialized():
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def show_written(zero_optimizer: Any) -> None:
    """Let forward passes see what was written to the master weights of DeepSpeed's optimizer (a collective call).

    ZeRO-1 and -2 have full copies of them for that, ZeRO-3 has copies of the small ones.
    """
    if hasattr(zero_optimizer, "update_lp_params"):
        zero_optimizer.update_lp_params()
    elif kept := zero_optimizer.persistent_parameters:
        kept[0].partition(kept)
        kept[0].all_gather(kept)


@cache
def _mesh_of(group: Any, device_type: str) -> DeviceMesh:
    return DeviceMesh.from_group(group, device_type)
