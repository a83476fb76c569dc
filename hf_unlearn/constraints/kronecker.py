"""Kronecker constraint: ridge on the input and on the output side."""

from dataclasses import dataclass
from typing import ClassVar

from hf_unlearn.constraints.base import Constraint, check_positive
from hf_unlearn.constraints.factors import Factor, by_block, price_scale, shrink
from hf_unlearn.constraints.registry import register_constraint
from hf_unlearn.statistics.eigen import Eigen


@register_constraint("kronecker")
@dataclass(frozen=True)
class KroneckerConstraint(Constraint):
    """Ridge on both sides: also spares the output directions that the retain predictions depend on.

    `(I + fisher / (strength_out * mean_eig(fisher)))^-1 D (I + gram / (strength_in * mean_eig(gram)))^-1` (METHOD,
    section 3).

    >>> import torch
    >>> from hf_unlearn.constraints import KroneckerConstraint
    >>> from hf_unlearn.statistics import eigendecomposition
    >>> fisher_OO = torch.diag(torch.tensor([3.0, 1.0]))  # mean eigenvalue 2
    >>> shrink_outputs = KroneckerConstraint(strength_out=0.5).left(eigendecomposition(fisher_OO))
    >>> shrink_outputs(torch.ones(1, 2))  # applied to the transposed step
    tensor([[0.2500, 0.5000]])

    Raises:
        SettingsError: A strength that is not positive.
    """

    strength_in: float = 0.003
    """Price of drift on the input side: smaller protects more."""
    strength_out: float = 0.03
    """Price of drift on the output side: smaller protects more."""

    needs_fisher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive("strength_in", self.strength_in)
        check_positive("strength_out", self.strength_out)

    def right(self, gram: Eigen) -> Factor:
        return by_block(gram, lambda block: shrink(block, price_scale(block, self.strength_in)))

    def left(self, fisher: Eigen) -> Factor:
        return by_block(fisher, lambda block: shrink(block, price_scale(block, self.strength_out)))
