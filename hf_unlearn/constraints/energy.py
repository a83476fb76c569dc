"""Energy constraint: steps orthogonal to the core gradient space."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_unlearn.constraints.factors import Factor, Keep, Remove, Scale, by_block
from hf_unlearn.statistics.eigen import Eigen, Spectrum, check_energy


@dataclass(frozen=True)
class EnergyConstraint:
    """Steps orthogonal to the core gradient space: `D (I - U U^T)`; the seed method's (PGU, WACV 2024, eq. 6).

    Idempotent, so that it is applied to the whole move from the original weights ("anchored"): rounding and the
    optimizer's momentum, preconditioning and weight decay leave nothing behind.
    """

    energy: float = 0.9
    """Share of the spectrum that is protected, in (0, 1]; 1 protects the whole span of the retain inputs."""
    spectrum: Spectrum = "singular_values"
    """What the share is of: "eigenvalues" (retained energy proper) or "singular_values" (the PGU authors' rule)."""
    min_rank_share: float = 0.0
    """Protect at least this share of the input dimensions."""

    needs_fisher: ClassVar[bool] = False
    anchored: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_energy(self.energy, self.spectrum, self.min_rank_share)

    def right(self, gram: Eigen) -> Factor:
        return by_block(gram, self._projection)

    def rank(self, gram: Eigen) -> int:
        """How many leading directions are protected wholly."""
        return gram.rank(self.energy, self.spectrum, self.min_rank_share)

    def _projection(self, gram: Eigen) -> Factor:
        """The thinner of the two forms of the projection; of a diagonal Gram the columns that are kept.

        Of a sketch the energy is counted against the whole trace. What it has missed is spread evenly, the most that
        singular values can sum to: the rank is rather too large than too small, unless the sketch has no more.
        """
        rank = self.rank(gram)
        if gram.diagonal:
            kept_I = torch.ones_like(gram.values_I, dtype=torch.float32)
            return Scale(kept_I.index_fill(0, gram.vectors_II[:rank], 0.0))
        if gram.missed is not None or 2 * rank <= gram.values_I.numel():
            return Remove(gram.vectors_II[:, :rank].float().contiguous())
        return Keep(gram.vectors_II[:, rank:].float().contiguous())

    def left(self, fisher: Eigen) -> Factor:
        raise AssertionError("the energy constraint is one-sided")
