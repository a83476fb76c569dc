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
from hf_unlearn.statistics.eigen import (
    Eigen,
    numerical_rank,
    participation_share,
    scale_for_share,
)


@register_constraint("energy_ridge")
@dataclass(frozen=True)
class EnergyRidgeConstraint(EnergyConstraint):
    """Energy's cut, and ridge's price on what it leaves: `D (I - U U^T) (I + gram / scale)^-1`.

    The scale is found from each Gram, so that the mean factor of the directions that the cut leaves is `free_share`:
    ridge regression's choice by effective degrees of freedom (Hastie, Tibshirani, Friedman, The Elements of Statistical
    Learning, section 3.4.1). Directions that the retain set has nothing in are free, and count: where they alone are as
    many, nothing else moves. A price relative to the mean of the whole spectrum would depend on its top: steps would
    be squeezed into a few directions of one network and be free in those of another.

    A network whose inputs have no leading directions is not cut but has ridge's price, at its default strength: where
    many directions are used alike, the cut takes most of them, and what it leaves is the retain rows' as much as the
    forget rows'. So it is in small language models trained from scratch (median participation ratio 0.17 of the width),
    and not in pretrained ones with a few very large features (SmolLM2-135M 0.013, MiniLM 0.03) or in a small vision
    transformer (0.04). All layers go one way: to cut half of them kept less than either.
    """

    free_share: float = 0.7
    """Mean share that gets through in the directions that are left, in (0, 1]: less protects more; 1 is energy."""
    max_participation: float = 0.1
    """Median participation ratio over layers, as a share of the width, up to which there is a cut; 1 always cuts."""

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
        """Itself, or ridge where the Grams, one for each layer under this constraint, have no leading directions."""
        shares = [participation_share(block.spectrum_I) for gram in grams for block in gram.blocks()]
        return self if median(shares) <= self.max_participation else RidgeConstraint()

    def _shrinkage(self, gram: Eigen) -> Factor:
        spectrum_I = gram.spectrum_I
        removed, seen, every = self.protected_rank(gram), numerical_rank(spectrum_I), spectrum_I.numel()
        wanted = self.free_share * (every - removed) - (every - seen)  # of the directions that were seen
        if wanted <= 0:
            return shrink(gram, math.inf, seen)
        return shrink(gram, scale_for_share(spectrum_I[removed:seen], wanted / max(seen - removed, 1)), removed)
