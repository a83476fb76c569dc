"""What every constraint provides, and a constraint bound to the statistics of one layer.

Shapes: step_OI is a step of a weight with O outputs and I inputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from hf_unlearn.constraints.factors import Factor
from hf_unlearn.constraints.layouts import apply_right, turned
from hf_unlearn.errors import SettingsError
from hf_unlearn.statistics.eigen import Eigen


class Constraint(Protocol):
    """What `bind_constraints` asks of a constraint."""

    needs_fisher: ClassVar[bool]
    anchored: ClassVar[bool]

    def right(self, gram: Eigen) -> Factor: ...

    def left(self, fisher: Eigen) -> Factor: ...


ConstraintLike = Constraint | None | Mapping[str, Constraint | None]


@dataclass(frozen=True, eq=False)
class BoundConstraint:
    """A constraint with the factors of one layer: a linear map on steps `[O, I]`, or `[G, O, I]` of G blocks.

    `anchored` constraints are idempotent and hold for the whole move from the original weight; the others are applied
    once to each realised step.
    """

    right: Factor | None
    left: Factor | None
    anchored: bool

    def __call__(self, step_OI: Tensor) -> Tensor:
        allowed_OI = step_OI if self.right is None else apply_right(self.right, step_OI)
        return allowed_OI if self.left is None else turned(apply_right(self.left, turned(allowed_OI)))


def check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise SettingsError(f"{name} must be above 0, got {value}; 1e-4 to 0.3 is the usual range")
