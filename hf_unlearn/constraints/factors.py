"""Symmetric matrices that constraints apply to steps, each in its cheapest form.

Shapes: step_OI is a step of a weight with O outputs and I inputs; basis_IK spans the core gradient space, basis_IM its
complement; G blocks.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from hf_unlearn.core.sharding import whole
from hf_unlearn.core.storage import Storage, fetch
from hf_unlearn.core.text import ShortRepr
from hf_unlearn.statistics.eigen import Eigen, eigendecomposition

NEGLIGIBLE_SHRINKAGE = 2.0**-25
"""Half the smallest relative spacing of float32 numbers: shrinking a number by a smaller share rounds back to it."""


class Factor(Protocol):
    """A symmetric matrix that is multiplied from the right: `step_OI -> step_OI @ matrix_II`."""

    def __call__(self, step_OI: Tensor) -> Tensor: ...

    def root(self) -> "Factor":
        """Return the symmetric square root: applied twice it is this factor. A projection is its own root."""
        ...

    def kept_in(self, storage: Storage) -> "Factor":
        """Return the same factor with its matrix kept in `storage` between uses."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class Remove(ShortRepr):
    """`I - U U^T`, from the basis U of what is removed: `2 O I K` multiply-adds.

    >>> Remove(torch.tensor([[1.0], [0.0]]))(torch.tensor([[3.0, 4.0]]))
    tensor([[0., 4.]])
    """

    basis_IK: Tensor

    def __call__(self, step_OI: Tensor) -> Tensor:
        basis_IK = fetch(self.basis_IK, step_OI.device).to(step_OI)
        return torch.addmm(step_OI, step_OI @ basis_IK, basis_IK.T, alpha=-1)

    def root(self) -> Factor:
        return self

    def kept_in(self, storage: Storage) -> Factor:
        return Remove(storage.keep(self.basis_IK))


@dataclass(frozen=True, eq=False, repr=False)
class Keep(ShortRepr):
    """`V V^T`, from the basis V of what is kept: `2 O I M` multiply-adds."""

    basis_IM: Tensor

    def __call__(self, step_OI: Tensor) -> Tensor:
        basis_IM = fetch(self.basis_IM, step_OI.device).to(step_OI)
        return (step_OI @ basis_IM) @ basis_IM.T

    def root(self) -> Factor:
        return self

    def kept_in(self, storage: Storage) -> Factor:
        return Keep(storage.keep(self.basis_IM))


@dataclass(frozen=True, eq=False, repr=False)
class Shrink(ShortRepr):
    """A dense symmetric matrix: `O I^2` multiply-adds."""

    matrix_II: Tensor

    def __call__(self, step_OI: Tensor) -> Tensor:
        return step_OI @ fetch(self.matrix_II, step_OI.device).to(step_OI)

    def root(self) -> Factor:
        eigen = eigendecomposition(whole(self.matrix_II))
        return Shrink(((eigen.vectors_II * eigen.values_I.sqrt()) @ eigen.vectors_II.T).float())

    def kept_in(self, storage: Storage) -> Factor:
        return Shrink(storage.keep(self.matrix_II))


@dataclass(frozen=True, eq=False, repr=False)
class ShrinkThin(ShortRepr):
    """`outside I + U diag(scale - outside) U^T` with a thin U: `2 O I K` multiply-adds, and no `I x I` matrix."""

    basis_IK: Tensor
    scale_K: Tensor
    outside: float

    def __call__(self, step_OI: Tensor) -> Tensor:
        basis_IK = fetch(self.basis_IK, step_OI.device).to(step_OI)
        scale_K = self.scale_K.to(step_OI) - self.outside
        return torch.addmm(step_OI, (step_OI @ basis_IK) * scale_K, basis_IK.T, beta=self.outside)

    def root(self) -> Factor:
        return ShrinkThin(self.basis_IK, self.scale_K.sqrt(), self.outside**0.5)

    def kept_in(self, storage: Storage) -> Factor:
        return ShrinkThin(storage.keep(self.basis_IK), self.scale_K, self.outside)


@dataclass(frozen=True, eq=False, repr=False)
class Scale(ShortRepr):
    """A diagonal matrix: `O I` multiplications."""

    scale_I: Tensor

    def __call__(self, step_OI: Tensor) -> Tensor:
        return step_OI * fetch(self.scale_I, step_OI.device).to(step_OI)

    def root(self) -> Factor:
        return Scale(whole(self.scale_I).sqrt())

    def kept_in(self, storage: Storage) -> Factor:
        return Scale(storage.keep(self.scale_I))


@dataclass(frozen=True, eq=False, repr=False)
class Stack(ShortRepr):
    """One factor for each block of a layer: `step_GOI -> step_GOI`."""

    blocks: tuple[Factor, ...]

    def __call__(self, step_OI: Tensor) -> Tensor:
        return torch.stack([block(step) for block, step in zip(self.blocks, step_OI, strict=True)])

    def root(self) -> Factor:
        return Stack(tuple(block.root() for block in self.blocks))

    def kept_in(self, storage: Storage) -> Factor:
        return Stack(tuple(block.kept_in(storage) for block in self.blocks))


def by_block(eigen: Eigen, make: Callable[[Eigen], Factor]) -> Factor:
    """Return `make(eigen)`; of a stack of decompositions the stack of their factors."""
    return make(eigen) if eigen.values_I.ndim == 1 else Stack(tuple(make(block) for block in eigen.blocks()))


def price_scale(eigen: Eigen, strength: float) -> float:
    """Return `strength * mean_eig(A)`; infinite if A is zero."""
    mean = eigen.spectrum_I.mean().item()
    return strength * mean if mean > 0 else math.inf


def shrink(eigen: Eigen, scale: float, removed: int = 0) -> Factor:
    """Return `(I + A / scale)^-1` from the eigendecomposition of A, with the `removed` leading directions set to zero.

    Directions outside a sketch's vectors are shrunk according to the mean of what the sketch misses. To let them pass
    would make them the bulk of every step: with 5% of the trace outside and strength 0.003, the true factor is of the
    order of 0.003 / 0.05 and not 1. The mean of the true factors is at least the one used (`1 / (1 + x)` is convex).
    """
    relative_I = eigen.values_I / scale
    kept_I = 1 / (1 + relative_I)
    kept_I[:removed] = 0.0
    if eigen.missed is not None:
        outside = 1 / (1 + eigen.missed / scale)
        return ShrinkThin(eigen.vectors_II.float(), kept_I.float(), outside.item())
    if eigen.diagonal:
        return Scale(kept_I.scatter(0, eigen.vectors_II, kept_I).float())
    shrunk = max(int((relative_I > NEGLIGIBLE_SHRINKAGE).sum()), removed)
    if 2 * shrunk < len(relative_I):
        return ShrinkThin(eigen.vectors_II[:, :shrunk].float().contiguous(), kept_I[:shrunk].float(), 1.0)
    vectors_II = eigen.vectors_II.double()
    matrix_II = (vectors_II * kept_I) @ vectors_II.T
    return Shrink(matrix_II.float())
