"""Ridge constraint: the closest step with a price on the retain drift."""

from dataclasses import dataclass

from hf_unlearn.constraints.base import Constraint, check_positive
from hf_unlearn.constraints.factors import Factor, by_block, price_scale, shrink
from hf_unlearn.constraints.registry import register_constraint
from hf_unlearn.statistics.eigen import Eigen


@register_constraint("ridge")
@dataclass(frozen=True)
class RidgeConstraint(Constraint):
    """The closest step to D with a price on the retain drift: `D (I + gram / (strength * mean_eig(gram)))^-1`.

    It solves `min |D' - D|^2 + tr(D' gram D'^T) / (strength * mean_eig(gram))` (METHOD, section 3).

    >>> import torch
    >>> from hf_unlearn.constraints import RidgeConstraint
    >>> from hf_unlearn.statistics import eigendecomposition
    >>> gram_II = torch.diag(torch.tensor([9.0, 1.0]))  # mean eigenvalue 5
    >>> RidgeConstraint(strength=0.2).right(eigendecomposition(gram_II))(torch.ones(1, 2))
    tensor([[0.1000, 0.5000]])

    Raises:
        SettingsError: A strength that is not positive.
    """

    strength: float = 0.003
    """Price of drift: smaller protects more. Directions of energy above `strength` times the mean are shrunk."""

    def __post_init__(self) -> None:
        check_positive("strength", self.strength)

    def right(self, gram: Eigen) -> Factor:
        return by_block(gram, lambda block: shrink(block, price_scale(block, self.strength)))
