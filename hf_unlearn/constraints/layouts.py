"""How the values of a trained parameter are distributed over the processes of a run.

A process reads and writes *local* values: the ones that it holds. Elementwise work (copies, norms, interpolation) uses
them alone. A constraint needs the *matrix*, which has the parameter's shape: a plain tensor, or a DTensor whose local
part belongs to this process.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from hf_unlearn.core.sharding import is_dtensor, is_fsdp_module, local_part, whole
from hf_unlearn.errors import ModelError


class ZeroOptimizer(Protocol):
    """DeepSpeed's own optimizer, which holds the float32 master weights."""

    param_groups: list[dict[str, Any]]
    clip_grad: float


class Layout(ABC):
    """Access to the local values of one parameter and of its gradient.

    Attributes:
        parameter: The parameter. FSDP and DeepSpeed replace parameter objects or their data, so a layout is made at
            each use (`layout_of`) and not kept.
        group: The processes whose local values together are the parameter; None where each process has all of it.
    """

    parameter: Any  # DeepSpeed sets attributes on it that no type knows
    group: ProcessGroup | None = None

    def __init__(self, parameter: nn.Parameter):
        self.parameter = parameter

    @abstractmethod
    def read(self) -> Tensor:
        """Return the local values; they may share memory with the parameter."""

    def write(self, local: Tensor) -> None:
        """Set the parameter's local values."""
        current = self.read()
        if current.data_ptr() != local.data_ptr() or current.dtype != local.dtype:
            current.copy_(local)

    def exchange(self, local: Tensor) -> Tensor:
        """Set the parameter's local values and return the previous ones."""
        previous = self.read().clone()
        self.write(local)
        return previous

    @abstractmethod
    def gradient(self) -> Tensor | None:
        """Return the local values of the gradient; None if there is no gradient."""

    def set_gradient(self, local: Tensor) -> None:
        """Set the local values of an existing gradient."""
        gradient = self.gradient()
        assert gradient is not None
        gradient.copy_(local)

    @abstractmethod
    def matrix(self, local: Tensor) -> Tensor:
        """Return one tensor of the parameter's shape, from the local values of all processes."""

    @abstractmethod
    def local(self, matrix: Tensor) -> Tensor:
        """Return this process's values of a tensor of the parameter's shape; the inverse of `matrix`."""


class Replicated(Layout):
    """Every process holds the full parameter: one process, or data parallel (DDP)."""

    def read(self) -> Tensor:
        return self.parameter.detach()

    def exchange(self, local: Tensor) -> Tensor:
        previous = self.parameter.data
        self.parameter.data = local  # no copy
        return previous

    def gradient(self) -> Tensor | None:
        return self.parameter.grad

    def matrix(self, local: Tensor) -> Tensor:
        return local

    def local(self, matrix: Tensor) -> Tensor:
        return matrix


class RowSharded(Layout):
    """A DTensor that is sharded along one dimension: FSDP2, with or without replicas (HSDP).

    `exchange` copies the values, because FSDP gathers from memory of its own and would not see a new pointer.

    Raises:
        ModelError: The parameter is sharded along several dimensions, or otherwise than by `Shard`.
    """

    def __init__(self, parameter: nn.Parameter):
        from torch.distributed.tensor import Shard

        super().__init__(parameter)
        sharded = [placement for placement in self.parameter.placements if not placement.is_replicate()]
        if len(sharded) > 1 or any(type(placement) is not Shard for placement in sharded):
            raise ModelError(
                f"a parameter of shape {tuple(parameter.shape)} is sharded as {self.parameter.placements}; only "
                "sharding along one dimension (FSDP2, HSDP) is supported, without tensor parallelism"
            )
        self.group = group_of(self.parameter)

    def read(self) -> Tensor:
        return self.parameter.detach().to_local()

    def gradient(self) -> Tensor | None:
        return None if self.parameter.grad is None else self.parameter.grad.to_local()

    def matrix(self, local: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        like = self.parameter
        return DTensor.from_local(
            local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )

    def local(self, matrix: Tensor) -> Tensor:
        if is_dtensor(matrix):
            return matrix.to_local()
        mesh = self.parameter.device_mesh
        for mesh_dim, placement in enumerate(self.parameter.placements):
            if placement.is_shard():
                rank, chunks = mesh.get_local_rank(mesh_dim), matrix.chunk(mesh.size(mesh_dim), placement.dim)
                matrix = chunks[rank] if rank < len(chunks) else matrix.narrow(placement.dim, 0, 0)
        return matrix.to(self.read().device)


class Zero3Pieces(Layout):
    """Equal pieces of the flattened parameter: DeepSpeed ZeRO-3. Values are those of the float32 master weights.

    If the number of processes divides the number of rows, a piece is a shard of rows and the matrix is a DTensor.
    Otherwise the matrix is gathered on every process.
    """

    def __init__(self, parameter: nn.Parameter):
        super().__init__(parameter)
        self.group = self.parameter.ds_process_group
        self.rank, self.processes = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.piece_size = self.parameter.ds_tensor.ds_numel
        # The last pieces may end with padding, which holds no values.
        self.local_size = max(0, min(self.piece_size, self.parameter.ds_numel - self.rank * self.piece_size))
        rows_divide = self.parameter.ds_shape[0] % self.processes == 0
        self.by_rows = rows_divide and self.piece_size * self.processes == self.parameter.ds_numel

    def read(self) -> Tensor:
        master = self.parameter._z3_optimizer.get_local_fp32_param(self.parameter)
        return master.detach()[: self.local_size]

    def write(self, local: Tensor) -> None:
        self.parameter._z3_optimizer.set_local_hp_param(self._padded(local), self.parameter)
        self.parameter.ds_tensor.data[: self.local_size].copy_(local)  # forward passes gather this copy

    def gradient(self) -> Tensor | None:
        return self.parameter._z3_optimizer.get_local_fp32_grad_for_param(self.parameter)[: self.local_size]

    def set_gradient(self, local: Tensor) -> None:
        self.parameter._z3_optimizer.set_local_grad_for_param(self._padded(local), self.parameter)

    def matrix(self, local: Tensor) -> Tensor:
        shape = self.parameter.ds_shape
        if self.by_rows:
            from torch.distributed.tensor import DTensor, Shard

            mesh = _mesh_of(self.group, local.device.type)
            rows = local.view(shape[0] // self.processes, *shape[1:])
            return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False)
        gathered = local.new_empty(self.processes * self.piece_size)
        dist.all_gather_into_tensor(gathered, self._padded(local), group=self.group)
        return gathered[: self.parameter.ds_numel].view(shape)

    def local(self, matrix: Tensor) -> Tensor:
        if is_dtensor(matrix):
            return matrix.to_local().reshape(-1)
        start = self.rank * self.piece_size
        return matrix.reshape(-1)[start : start + self.local_size].to(self.parameter.ds_tensor.device)

    def _padded(self, local: Tensor) -> Tensor:
        return torch.nn.functional.pad(local, (0, self.piece_size - self.local_size))


class Zero12Fragments(Layout):
    """A contiguous fragment of the flattened parameter, which may be empty: DeepSpeed ZeRO-1 and ZeRO-2.

    These stages concatenate the float32 master weights of all parameters and cut them into pieces of equal size. Values
    are those of the master weights. The matrix is gathered on every process.
    """

    def __init__(self, parameter: nn.Parameter):
        super().__init__(parameter)
        self.group, self.master = self.parameter._dp_group, self.parameter._hp_mapping
        self.start = self.master.lp_fragment_address.start if self.master is not None else 0
        self.local_size = self.master.lp_fragment_address.numel if self.master is not None else 0

    def read(self) -> Tensor:
        if self.master is None:
            return torch.empty(0, device=self.parameter.device)
        return self.master.get_hp_fragment().detach()

    def gradient(self) -> Tensor | None:
        if self.master is None:
            return torch.empty(0, device=self.parameter.device)
        gradient = self.master.get_lp_grad_fragment(self.parameter._index_in_param_group).view(-1)
        if len(gradient) == self.local_size:
            return gradient
        return gradient[self.start : self.start + self.local_size]

    def matrix(self, local: Tensor) -> Tensor:
        full = torch.zeros(self.parameter.numel(), device=local.device)  # float32: gradients may have fewer bits
        full[self.start : self.start + self.local_size] = local
        dist.all_reduce(full, group=self.group)
        return full.view(self.parameter.shape)

    def local(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(-1)[self.start : self.start + self.local_size]


def layout_of(parameter: nn.Parameter) -> Layout:
    """Return the current layout of a parameter.

    >>> type(layout_of(nn.Linear(2, 3).weight)).__name__
    'Replicated'
    """
    if is_dtensor(parameter):
        return RowSharded(parameter)  # type: ignore[arg-type]  # both a DTensor and a Parameter
    if hasattr(parameter, "_hp_mapping"):
        return Zero12Fragments(parameter)
    return Zero3Pieces(parameter) if hasattr(parameter, "ds_tensor") else Replicated(parameter)


def gathered_parameter(parameter: nn.Parameter) -> Tensor:
    """Return the full parameter, trained or frozen, on every process (a collective call if it is sharded)."""
    if hasattr(parameter, "ds_tensor"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()
    return whole(parameter.detach())


def apply_right(factor: Callable[[Tensor], Tensor], matrix_OI: Tensor) -> Tensor:
    """Return `factor(matrix_OI)` for a factor that acts on each row.

    A DTensor sharded by rows needs no communication. One sharded by columns is first redistributed by rows, and
    redistributed back afterwards: each way is an all-to-all of `O I / P` numbers per process, less than a sum over
    shards would take.
    """
    if not is_dtensor(matrix_OI):
        return factor(matrix_OI)
    from torch.distributed.tensor import DTensor, Shard

    original_placements = matrix_OI.placements
    row_placements = tuple(Shard(0) if placement == Shard(1) else placement for placement in original_placements)
    moved = row_placements != original_placements
    by_rows = matrix_OI.redistribute(placements=row_placements) if moved else matrix_OI
    local = factor(by_rows.to_local())
    shape = (matrix_OI.shape[0], local.shape[1])
    result = DTensor.from_local(
        local, matrix_OI.device_mesh, row_placements, run_check=False, shape=torch.Size(shape), stride=(shape[1], 1)
    )
    return result.redistribute(placements=original_placements) if moved else result


def transposed(matrix: Tensor) -> Tensor:
    """Return the transpose of a matrix, or of each matrix of a stack."""
    return matrix.T if matrix.ndim == 2 else matrix.mT


def local_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Return `[len(tensors)]`: the sum of squares of the local part of each tensor, in float32."""
    return torch.stack(torch._foreach_norm([local_part(tensor) for tensor in tensors], 2, dtype=torch.float32)).square()


def group_of(matrix: Tensor) -> ProcessGroup | None:
    """Return the processes that hold the shards of a DTensor; None for a plain tensor, which is complete."""
    if is_dtensor(matrix):
        for mesh_dim, placement in enumerate(matrix.placements):
            if placement.is_shard():
                return matrix.device_mesh.get_group(mesh_dim)
    return None


def sum_over_shards(values_N: Tensor, groups: Sequence[ProcessGroup | None]) -> Tensor:
    """Sum each value over its group of processes, with one all-reduce for all; a value without a group stays.

    Raises:
        ModelError: The values belong to several different groups.
    """
    different = {id(group): group for group in groups if group is not None}
    if not different:
        return values_N
    if len(different) > 1:
        raise ModelError(f"trained parameters are sharded over {len(different)} different groups of processes; use one")
    sharded_N = torch.tensor([group is not None for group in groups], device=values_N.device)
    total_N = torch.where(sharded_N, values_N, 0)
    dist.all_reduce(total_N, group=next(iter(different.values())))
    return torch.where(sharded_N, total_N, values_N)


def reshard_gathered(model: nn.Module) -> None:
    """Let FSDP free the full parameters that it still holds after a forward pass without gradients."""
    if dist.is_initialized():
        for module in model.modules():
            if is_fsdp_module(module):
                module.reshard()


def publish_master_weights(zero_optimizer: Any) -> None:
    """Copy DeepSpeed's float32 master weights to the parameters that forward passes read (a collective call).

    ZeRO-1 and ZeRO-2 keep such copies of all parameters, ZeRO-3 of the small ones only.
    """
    if hasattr(zero_optimizer, "update_lp_params"):
        zero_optimizer.update_lp_params()
    elif persistent := zero_optimizer.persistent_parameters:
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)


@cache
def _mesh_of(group: ProcessGroup, device_type: str) -> DeviceMesh:
    return DeviceMesh.from_group(group, device_type)
