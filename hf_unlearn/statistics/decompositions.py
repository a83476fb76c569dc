"""Eigendecompositions of the Grams and Fishers of a model, each computed once and by one process."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from hf_unlearn.core.processes import communication_device, from_owner, share_out, world
from hf_unlearn.core.sharding import whole
from hf_unlearn.core.storage import Storage, fetch
from hf_unlearn.statistics.eigen import Eigen, eigendecomposition

Key = tuple[Literal["gram", "fisher"], str]
"""Which matrix: a Gram by its name, or a Fisher by its layer."""


@dataclass(frozen=True)
class Job:
    """A matrix to decompose.

    Attributes:
        matrix: Returns the matrix or its sketch; it may be in shards.
        shape: Its shape.
        positions: Number of rows that it is the second moment of.
    """

    matrix: Callable[[], Tensor]
    shape: tuple[int, ...]
    positions: int


class Decompositions:
    """A cache of decompositions, with eigenvectors in float32."""

    def __init__(self) -> None:
        self._eigen: dict[Key, Eigen] = {}

    def get(self, key: Key, job: Job, storage: Storage) -> Eigen:
        """Return one decomposition; every process computes it if it is not in the cache."""
        if key not in self._eigen:
            eigen = eigendecomposition(whole(job.matrix()), job.positions).rounded()
            self._eigen[key] = replace(eigen, vectors_II=storage.keep(eigen.vectors_II))
        return self._eigen[key]

    def compute(self, jobs: Mapping[Key, Job], storage: Storage, device: torch.device | str | None) -> None:
        """Compute those that are not in the cache, divided among the processes of a distributed run.

        Args:
            jobs: What to decompose.
            storage: Where eigenvectors are kept.
            device: Where to compute; default: where the matrices are.
        """
        jobs = {key: job for key, job in jobs.items() if key not in self._eigen}
        owners = share_out({key: job.shape[-1] for key, job in jobs.items()})
        matrices = {}
        for key, job in jobs.items():  # gathered one after the other; only its owner keeps a matrix
            matrix = job.matrix()
            matrix = fetch(matrix, device or matrix.device)
            if owners[key] == world()[0]:
                matrices[key] = matrix
        computed = {}
        for key in list(matrices):  # each matrix is freed once it is decomposed
            computed[key] = eigendecomposition(matrices.pop(key), jobs[key].positions).rounded()
        for key, job in jobs.items():
            eigen = sent_by_owner(computed.pop(key, None), job.shape, owners[key])
            self._eigen[key] = replace(eigen, vectors_II=storage.keep(eigen.vectors_II))


def sent_by_owner(eigen: Eigen | None, shape: tuple[int, ...], owner: int) -> Eigen:
    """Return, on every process, the decomposition that process `owner` computed.

    Args:
        eigen: The decomposition, on the owner; None on the others.
        shape: Shape of the matrix.
        owner: Rank of the owner.
    """
    if world()[1] == 1:
        assert eigen is not None
        return eigen
    form = torch.tensor([0, 0] if eigen is None else [eigen.values_I.shape[-1], eigen.missed is not None])
    from_owner([form], owner)
    if eigen is None:
        eigen = _uninitialised(shape, *form.tolist())
    negative_share = torch.tensor(eigen.negative_share, dtype=torch.float64)
    missed = [] if eigen.missed is None else [eigen.missed]
    from_owner([eigen.values_I, eigen.vectors_II, negative_share, *missed], owner)
    return replace(eigen, negative_share=negative_share.item())


def _uninitialised(shape: tuple[int, ...], count: int, thin: int) -> Eigen:
    """A decomposition of a matrix of this shape into `count` vectors (per block), without values."""
    vectors = (*shape[:-1], count)
    values_I = torch.empty((*vectors[:-2], vectors[-1]), dtype=torch.float64, device=communication_device())
    dtype = torch.int64 if len(shape) == 1 else torch.float32  # a diagonal's vectors are kept by index
    missed = values_I.new_empty(shape[:-2]) if thin else None
    return Eigen(values_I, values_I.new_empty(vectors, dtype=dtype), 0.0, missed)
