"""When to stop collecting: once more rows no longer change the leading directions of any Gram.

Shapes: I features, K leading directions.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from hf_unlearn.core.processes import gather
from hf_unlearn.errors import SettingsError
from hf_unlearn.statistics.eigen import Eigen, eigendecomposition

ENERGY = 0.9
"""Share of the energy that the compared leading directions hold; the default energy of the energy constraint."""


class EarlyStop:
    """The stopping rule behind `collect_statistics(tolerance=...)`.

    After 1, 2, 4, 8, ... batches each Gram's basis of 90% of the energy is compared with its basis at half the rows.
    `change` is the share of the energy of all rows so far that the old basis captures less than the best basis of its
    rank, maximised over the Grams. This is the change of the projector with each direction weighted by its energy:
    among directions of nearly equal energy, which never converge, the choice does not matter. Diagonal Grams are left
    out.

    >>> import torch
    >>> early_stop = EarlyStop(tolerance=0.05)
    >>> gram_II = torch.diag(torch.tensor([4.0, 1.0, 0.1]))
    >>> early_stop.should_stop(lambda: [("layer", gram_II)])  # nothing to compare with yet
    False
    >>> early_stop.should_stop(lambda: [("layer", 2 * gram_II)])
    True

    Attributes:
        change: The last change; None before the second comparison.
        stopped: Whether the change was at most the tolerance.

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

    def should_stop(self, grams_so_far: Callable[[], Iterable[tuple[str, Tensor]]]) -> bool:
        """Return whether to stop after this batch; every process must call it after each batch and gets one answer.

        Args:
            grams_so_far: Returns the sums of each Gram over the rows of all processes up to now, by name.
        """
        self._batches += 1
        if self._batches & (self._batches - 1):  # not a power of two
            return False
        changes = []
        for name, sums in grams_so_far():
            blocks = eigendecomposition(sums).blocks()
            old_bases = self._bases.get(name, [])
            changes += [lost_energy(block, basis_IK) for block, basis_IK in zip(blocks, old_bases, strict=False)]
            self._bases[name] = [block.vectors_II[:, : block.rank(ENERGY)].float() for block in blocks]
        self.change = max(changes) if changes else None
        within_tolerance = self.change is not None and self.change <= self.tolerance
        self.stopped = gather(within_tolerance)[0]  # process 0 decides: the sums of processes may differ in rounding
        return self.stopped


def lost_energy(gram: Eigen, basis_IK: Tensor) -> float:
    """Return the share of the trace that an orthonormal basis captures less than the leading K eigenvectors do."""
    total = gram.spectrum_I.sum()
    if total <= 0:
        return 0.0
    captured = (gram.vectors_II.T @ basis_IK.double()).square().sum(1) @ gram.values_I
    best = gram.values_I[: basis_IK.shape[1]].sum()
    return max(0.0, ((best - captured) / total).item())


def in_random_order(count: int) -> list[int]:
    """Return a permutation of `count` row numbers, the same at every call: similar rows often stand together."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
