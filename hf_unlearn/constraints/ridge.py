"""Ridge constraint: the closest step with a price on the retain drift."""

from dataclasses import dataclass
from typing import ClassVar

from hf_unlearn.constraints.base import check_positive
from hf_unlearn.constraints.factors import Factor, by_block, price_scale, shrink
from hf_unlearn.statistics.eigen import Eigen


@dataclass(frozen=True)
class RidgeConstraint:
    """The closest step to D with a price on the retain drift: `D (I + gram / (strength * mean_eig(gram)))^-1`.

    Solves `min |D' - D|^2 + tr(D' gram D'^T) / (strength * mean_eig(gram))` (METHOD, section 3).
    """

    strength: float = 0.003
    """Price of drift: smaller protects more. Directions of energy above `strength` times the mean are shrunk."""

    needs_fisher: ClassVar[bool] = False
    anchored: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_positive("strength", self.strength)

    def right(self, gram: Eigen) -> Factor:
        return by_block(gram, lambda parts: shrink(parts, price_scale(parts, self.strength)))

    def left(self, fisher: Eigen) -> Factor:
        raise AssertionError("the ridge constraint is one-sided")
