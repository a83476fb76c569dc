"""Energy constraint: steps orthogonal to the core gradient space."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from hf_unlearn.constraints.base import Constraint
from hf_unlearn.constraints.factors import Factor, Keep, Remove, Scale, by_block
from hf_unlearn.constraints.registry import register_constraint
from hf_unlearn.statistics.eigen import Eigen, Spectrum, check_energy, rank_for_energy


@register_constraint("energy")
@dataclass(frozen=True)
class EnergyConstraint(Constraint):
    """Steps orthogonal to the core gradient space: `D (I - U U^T)`; the constraint of PGU (WACV 2024, eq. 6).

    Its map is idempotent, so it applies to the total move from the original weights ("anchored"): rounding and the
    optimizer's momentum, preconditioning and weight decay leave nothing in the core space.

    >>> import torch
    >>> from hf_unlearn.constraints import EnergyConstraint
    >>> from hf_unlearn.statistics import eigendecomposition
    >>> gram_II = torch.diag(torch.tensor([8.0, 1.0, 1.0]))
    >>> project = EnergyConstraint(energy=0.8, spectrum="eigenvalues").right(eigendecomposition(gram_II))
    >>> project(torch.ones(1, 3))
    tensor([[0., 1., 1.]])

    Raises:
        SettingsError: A setting out of range.
    """

    energy: float = 0.9
    """Share of the spectrum that is protected, in (0, 1]; 1 protects the entire span of the retain inputs."""
    spectrum: Spectrum = "singular_values"
    """What the share is of: "eigenvalues" (retained energy) or "singular_values" (as in the PGU authors' code)."""
    min_rank_share: float = 0.0
    """Protect at least this share of the input dimensions."""

    anchored: ClassVar[bool] = True
    factor_share: ClassVar[float] = 0.5  # the thinner of the basis and its complement

    def __post_init__(self) -> None:
        check_energy(self.energy, self.spectrum, self.min_rank_share)

    def right(self, gram: Eigen) -> Factor:
        return by_block(gram, self._projection)

    def protected_rank(self, gram: Eigen) -> int:
        return gram.rank(self.energy, self.spectrum, self.min_rank_share)

    def _projection(self, gram: Eigen) -> Factor:
        """The thinner of the two forms of the projection; of a diagonal Gram the mask of the columns that are kept.

        The energy of a sketch is counted against the full trace. What the sketch misses is spread evenly, which
        maximises the sum of singular values: the rank is rather too large than too small, as long as the sketch has
        enough directions.
        """
        rank = self.protected_rank(gram)
        if gram.diagonal:
            kept_I = torch.ones_like(gram.values_I, dtype=torch.float32)
            return Scale(kept_I.index_fill(0, gram.vectors_II[:rank], 0.0))
        if gram.missed is not None or 2 * rank <= gram.values_I.numel():
            return Remove(gram.vectors_II[:, :rank].float().contiguous())
        return Keep(gram.vectors_II[:, rank:].float().contiguous())

    def sketch_shortfall(self, gram: Eigen) -> str | None:
        rule = (self.energy, self.spectrum, self.min_rank_share)
        if all(rank_for_energy(block.spectrum_I, *rule) <= len(block.values_I) for block in gram.blocks()):
            return None
        held = min(1 - block.missed_share for block in gram.blocks())
        return (
            f"holds {held:.1%} of its trace; energy {self.energy} ({self.spectrum}) may need more directions than it "
            "has, so all of them are protected"
        )
