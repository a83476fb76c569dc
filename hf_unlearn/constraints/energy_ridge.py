"""The default constraint: energy's cut, and ridge's price on the directions that the cut leaves."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import ClassVar

from hf_unlearn.constraints.base import Constraint
from hf_unlearn.constraints.energy import EnergyConstraint
from hf_unlearn.constraints.factors import Factor, by_block, shrink
from hf_unlearn.constraints.registry import register_constraint
from hf_unlearn.constraints.ridge import RidgeConstraint
from hf_unlearn.errors import SettingsError
from hf_unlearn.statistics.eigen import Eigen, numerical_rank, participation_share, scale_for_share


@register_constraint("energy_ridge")
@dataclass(frozen=True)
class EnergyRidgeConstraint(EnergyConstraint):
    """Energy's cut, and ridge's price on what it leaves: `D (I - U U^T) (I + gram / scale)^-1`.

    The scale is computed from each Gram so that the mean factor of the directions that the cut leaves is `free_share`.
    This is how ridge regression is set by its effective degrees of freedom (Hastie, Tibshirani, Friedman, The Elements
    of Statistical Learning, section 3.4.1). Directions in which the retain set has no energy are free, and count: if
    they alone are that share, nothing else moves. A price relative to the mean of the full spectrum would depend on its
    leading eigenvalues: steps would be confined to a few directions in one network and free in those of another.

    A network whose inputs have no leading directions is not cut; it gets ridge's price at ridge's default strength.
    Where many directions are used equally, the cut would take most of them, and what it leaves would belong to the
    retain rows as much as to the forget rows. This is so in small language models trained from scratch (median
    participation ratio 0.17 of the width), but not in pretrained ones with a few very large features (SmolLM2-135M
    0.013, MiniLM 0.03) nor in a small vision transformer (0.04). All layers are treated alike: to cut half of them kept
    less than either alternative.

    >>> import torch
    >>> from hf_unlearn.constraints import EnergyRidgeConstraint
    >>> from hf_unlearn.statistics import eigendecomposition
    >>> gram = eigendecomposition(torch.diag(torch.tensor([100.0, 1.0, 1.0])))
    >>> constraint = EnergyRidgeConstraint(energy=0.8, free_share=0.5, max_participation=1)
    >>> constraint.right(gram)(torch.ones(1, 3))
    tensor([[0.0000, 0.5000, 0.5000]])
    >>> EnergyRidgeConstraint().resolve([eigendecomposition(torch.eye(3))])  # no leading directions
    RidgeConstraint(strength=0.003)

    Raises:
        SettingsError: A setting out of range.
    """

    free_share: float = 0.7
    """Mean share of a step that passes in the directions that the cut leaves, in (0, 1]: less protects more; 1 is
    energy."""
    max_participation: float = 0.1
    """Cut only if the median participation ratio over layers is at most this share of the width; 1 always cuts."""

    anchored: ClassVar[bool] = False
    factor_share: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.free_share <= 1:
            raise SettingsError(f"free_share must be in (0, 1], got {self.free_share}; 1 is energy alone")
        if not 0 < self.max_participation <= 1:
            raise SettingsError(f"max_participation must be in (0, 1], got {self.max_participation}; 1 always cuts")

    def right(self, gram: Eigen) -> Factor:
        return by_block(gram, self._shrinkage)

    def resolve(self, grams: Sequence[Eigen]) -> Constraint:
        """Return itself, or ridge if the Grams of the layers that have this constraint have no leading directions."""
        shares = [participation_share(block.spectrum_I) for gram in grams for block in gram.blocks()]
        return self if median(shares) <= self.max_participation else RidgeConstraint()

    def _shrinkage(self, gram: Eigen) -> Factor:
        spectrum_I = gram.spectrum_I
        removed, seen, total = self.protected_rank(gram), numerical_rank(spectrum_I), spectrum_I.numel()
        free_of_seen = self.free_share * (total - removed) - (total - seen)  # unseen directions are free already
        if free_of_seen <= 0:
            return shrink(gram, math.inf, seen)
        return shrink(gram, scale_for_share(spectrum_I[removed:seen], free_of_seen / max(seen - removed, 1)), removed)
