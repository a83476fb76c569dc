"""The losses of PGU (WACV 2024), the method that this package started from."""

import torch
from torch import Tensor

from hf_unlearn.losses.registry import register_loss
from hf_unlearn.models.forward import Predictions


@register_loss("pgu")
def pgu(predictions: Predictions, original: None, *, offset: float = 0.05, entropy_weight: float = 0.2) -> Tensor:
    """Return `-log(1 - (p_y - offset)) - entropy_weight * H(p)` per label (PGU, WACV 2024, section 3.4).

    The argument of the logarithm is clamped to (0, 1]: where p_y is below `offset`, the first term and its gradient are
    zero.
    """
    log_p_LV = predictions.logits_LV.float().log_softmax(-1)
    return _push_away(log_p_LV, predictions.labels_L, offset) - entropy_weight * _entropy(log_p_LV)


@register_loss("pgu_poison")
def pgu_poison(predictions: Predictions, original: None, *, offset: float = 0.1, entropy_weight: float = 0.2) -> Tensor:
    """Return `-log(1 - (p_y - offset)) + entropy_weight * H(p without y)` per label, for labels that were wrong.

    The distribution without the label is renormalised and made sharper instead of flatter, so that the most probable
    other label takes over; that is the clean one if the model knows better (`depoisoning.py` of PGU's authors).
    """
    log_p_LV = predictions.logits_LV.float().log_softmax(-1)
    others_LV = log_p_LV.scatter(1, predictions.labels_L.unsqueeze(1), -1e4).log_softmax(-1)
    return _push_away(log_p_LV, predictions.labels_L, offset) + entropy_weight * _entropy(others_LV)


def _push_away(log_p_LV: Tensor, labels_L: Tensor, offset: float) -> Tensor:
    p_L = log_p_LV.gather(1, labels_L.unsqueeze(1)).squeeze(1).exp()
    return -(1 - (p_L - offset)).clamp(min=torch.finfo(p_L.dtype).tiny, max=1).log()


def _entropy(log_p_LV: Tensor) -> Tensor:
    return -(log_p_LV.exp() * log_p_LV).sum(-1)
