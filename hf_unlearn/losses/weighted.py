"""Gradient ascent with a weight per label that decreases as the label is forgotten; weights are detached."""

from torch import Tensor

from hf_unlearn.losses.registry import register_loss
from hf_unlearn.models.forward import Predictions


@register_loss("wga", alpha=1.0)
def wga(predictions: Predictions, original: None, *, beta: float = 1.0) -> Tensor:
    """Return `-p^beta * nll` per label, where p is its probability.

    WGA, Wang et al., ICLR 2025, arXiv 2502.19301, section 5.
    """
    nll_L = predictions.nll_L
    return -(-beta * nll_L.detach()).exp() * nll_L


@register_loss("satimp", gamma=0.1, alpha=1.0)
def satimp(predictions: Predictions, original: None, *, beta1: float = 5.0, beta2: float = 1.0) -> Tensor:
    """Return `-p^beta1 (1 - p)^beta2 * nll` per label: saturation times importance.

    SatImp, Yang et al., ICML 2025, arXiv 2505.11953, section 5. Weights are per label as in open-unlearning, whose
    configuration also has gamma 0.1 and alpha 1 (its class swaps the two).
    """
    nll_L = predictions.nll_L
    p_L = (-nll_L.detach()).exp()
    return -(p_L**beta1) * (1 - p_L) ** beta2 * nll_L
