"""The seed method's loss."""

import torch
from torch import Tensor

from hf_unlearn.losses.base import register_loss
from hf_unlearn.predictions import Predictions


@register_loss("pgu")
def pgu(predictions: Predictions, original: None, *, offset: float = 0.05, entropy_weight: float = 0.2) -> Tensor:
    """`-log(1 - (p_y - offset)) - entropy_weight * H(p)` per label (PGU, WACV 2024, section 3.4).

    The argument of the logarithm is kept in (0, 1]: below `offset` the first term is zero and pushes no further.
    """
    log_p_LV = predictions.logits_LV.float().log_softmax(-1)
    p_L = log_p_LV.gather(1, predictions.labels_L.unsqueeze(1)).squeeze(1).exp()
    entropy_L = -(log_p_LV.exp() * log_p_LV).sum(-1)
    argument_L = (1 - (p_L - offset)).clamp(min=torch.finfo(p_L.dtype).tiny, max=1)
    return -argument_L.log() - entropy_weight * entropy_L
