"""What every constraint provides, and a constraint bound to the statistics of one layer.

Shapes: step_OI is a step of a weight with O outputs and I inputs; G blocks.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_unlearn.constraints.factors import Factor
from hf_unlearn.constraints.layouts import apply_right, transposed
from hf_unlearn.errors import SettingsError
from hf_unlearn.statistics.eigen import Eigen

MIN_SKETCHED_SHARE = 0.9
"""Share of the trace that a sketch must hold under a soft constraint; below it a warning says so, because what a sketch
misses is shrunk evenly in all directions."""


class Constraint(ABC):
    """Which steps are allowed: a symmetric factor on the inputs and, for two-sided constraints, one on the outputs.

    A subclass is a frozen dataclass whose fields are the settings, registered under a name with
    `@register_constraint("name")`. `bind_constraints` turns it and the statistics into one `BoundConstraint` per layer.
    Only `right` is required; the other members say what differs from a one-sided soft constraint.

    >>> from dataclasses import dataclass
    >>> from hf_unlearn.constraints.factors import Scale
    >>> @dataclass(frozen=True)
    ... class EvenConstraint(Constraint):
    ...     share: float = 0.5
    ...     def right(self, gram):
    ...         return Scale(gram.spectrum_I.new_full((gram.spectrum_I.numel(),), self.share))
    >>> EvenConstraint(0.25).needs_fisher, EvenConstraint(0.25).anchored
    (False, False)

    Attributes:
        needs_fisher: Whether it has a left factor, so that the statistics need Fishers.
        anchored: Whether its map is idempotent. It then applies to the total move from the original weight; other
            constraints are applied once to each realised step.
        factor_share: The right factor of I features stores at most this share of `I * I` numbers.
    """

    needs_fisher: ClassVar[bool] = False
    anchored: ClassVar[bool] = False
    factor_share: ClassVar[float] = 1.0

    @abstractmethod
    def right(self, gram: Eigen) -> Factor:
        """Return the factor on the input side, from the decomposed Gram of a layer."""

    def left(self, fisher: Eigen) -> Factor | None:
        """Return the factor on the output side, from the decomposed Fisher of a layer; None if it is one-sided."""
        return None

    def resolve(self, grams: Sequence[Eigen]) -> "Constraint":
        """Return the constraint to bind, given the Grams of all layers that have this one; by default itself."""
        return self

    def protected_rank(self, gram: Eigen) -> int | None:
        """Return how many leading directions no step may change; None for a constraint that only shrinks."""
        return None

    def sketch_shortfall(self, gram: Eigen) -> str | None:
        """Return what a sketched Gram lacks for this constraint, as the end of a warning; None if it holds enough."""
        held = min((1 - block.missed_share for block in gram.blocks()), default=1.0)
        if gram.missed is None or held >= MIN_SKETCHED_SHARE:
            return None
        return f"holds {held:.1%} of its trace; the rest is shrunk evenly in all directions"

    @classmethod
    def summary(cls) -> str:
        """Return one line on what the constraint does, for the model card: the first line of its docstring."""
        return (inspect.getdoc(cls) or cls.__name__).splitlines()[0]


ConstraintLike = Constraint | None | Mapping[str, Constraint | None]
"""One constraint for all layers, None for no constraint, or a mapping from layer name patterns to either."""


@dataclass(frozen=True, eq=False)
class BoundConstraint:
    """A constraint with the factors of one layer: a linear map on steps `[O, I]`, or `[G, O, I]` of G blocks.

    >>> import torch
    >>> from hf_unlearn.constraints.factors import Remove
    >>> basis_IK = torch.tensor([[1.0], [0.0]])
    >>> bound = BoundConstraint(Remove(basis_IK), left=None, anchored=True)
    >>> bound(torch.tensor([[3.0, 4.0]]))
    tensor([[0., 4.]])

    Attributes:
        right, left: Factors on the inputs and on the outputs; None is the identity.
        anchored: Whether it applies to the total move from the original weight, instead of to each step.
    """

    right: Factor | None
    left: Factor | None
    anchored: bool

    def __call__(self, step_OI: Tensor) -> Tensor:
        allowed_OI = step_OI if self.right is None else apply_right(self.right, step_OI)
        return allowed_OI if self.left is None else transposed(apply_right(self.left, transposed(allowed_OI)))


def check_positive(name: str, value: float) -> None:
    """Raise `SettingsError` unless `value` is above 0."""
    if not value > 0:
        raise SettingsError(f"{name} must be above 0, got {value}; 1e-4 to 0.3 is the usual range")
