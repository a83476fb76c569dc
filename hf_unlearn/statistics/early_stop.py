"""When to stop collecting: once the leading directions of every Gram have settled.

Shapes: I features, K leading directions.
"""

import torch
from torch import Tensor

from hf_unlearn.core.processes import gather
from hf_unlearn.errors import SettingsError
from hf_unlearn.statistics.accumulator import Accumulator
from hf_unlearn.statistics.eigen import Eigen, eigendecomposition

ENERGY = 0.9


class EarlyStop:
    """The rule behind `collect_statistics(tolerance=...)`.

    After 1, 2, 4, 8, ... batches each Gram's basis of 90% of the energy is compared with what it was at half the rows:
    `change` is the share of the energy of all rows so far that the old basis catches less than the best one of its
    rank, the largest of any Gram. That is the change of the projector, with each direction weighted by its energy:
    among directions of nearly the same energy, which never settle, it does not matter which are chosen. Diagonal Grams
    are left out.

    Raises:
        SettingsError: A tolerance outside (0, 1).
    """

    def __init__(self, tolerance: float):
        if not 0 < tolerance < 1:
            raise SettingsError(f"tolerance must be between 0 and 1, got {tolerance}; it is a share of the energy")
        self.tolerance = tolerance
        self.change: float | None = None
        self.stopped = False
        self._bases: dict[str, list[Tensor]] = {}
        self._batches = 0

    def settled(self, collector: Accumulator) -> bool:
        """Whether to stop after this batch; every process must ask after each of its batches, and is told the same."""
        self._batches += 1
        if self._batches & (self._batches - 1):  # no power of two
            return False
        changes = []
        for name, sums in collector.grams_so_far():
            blocks = eigendecomposition(sums).blocks()
            old = self._bases.get(name, [])
            changes += [lost_energy(block, basis_IK) for block, basis_IK in zip(blocks, old, strict=False)]
            self._bases[name] = [block.vectors_II[:, : block.rank(ENERGY)].float() for block in blocks]
        self.change = max(changes) if changes else None
        done = self.change is not None and self.change <= self.tolerance
        self.stopped = gather(done)[0]  # process 0 decides: sums over processes may differ in the last bit
        return self.stopped


def lost_energy(gram: Eigen, basis_IK: Tensor) -> float:
    """Share of the trace that an orthonormal basis catches less than the leading K eigenvectors do."""
    total = gram.spectrum_I.sum()
    if total <= 0:
        return 0.0
    caught = (gram.vectors_II.T @ basis_IK.double()).square().sum(1) @ gram.values_I
    best = gram.values_I[: basis_IK.shape[1]].sum()
    return max(0.0, ((best - caught) / total).item())


def in_random_order(count: int) -> list[int]:
    """All of `count` rows, the same order at every call: rows that belong together often stand together."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
