"""Gradient ascent and its balanced form."""

from torch import Tensor

from hf_unlearn.losses.base import register_loss
from hf_unlearn.predictions import Predictions


@register_loss("grad_diff", needs_retain=True, alpha=1.0)
@register_loss("grad_ascent")
def negative_likelihood(predictions: Predictions, original: None) -> Tensor:
    """Minus the negative log-likelihood of each label (Thudi et al., EuroS&P 2022; Liu et al., CoLLAs 2022)."""
    return -predictions.nll_L
