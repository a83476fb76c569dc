"""Flat predictions under a bound on the retain loss."""

from torch import Tensor

from hf_unlearn.losses.registry import register_loss
from hf_unlearn.models.forward import Predictions


@register_loss("pdu", needs_retain=True, dual_weight=True, alpha=1.0)
def pdu(predictions: Predictions, original: None) -> Tensor:
    """`(max z - mean z)^2` per label, z its logits; the retain term's weight follows a bound on it.

    Entesari et al., arXiv 2506.05314: minimise this where the retain loss is at most `eps`, by a dual weight (see
    `losses.dual`). The constant `-weight * eps` of the Lagrangian is left out: it has no gradient. open-unlearning
    masks the logits *at* the label positions, one to the right of those that predict the labels; here they are the
    ones that predict. Its update upon epochs takes another pass over the retain rows, here it is the mean over the
    epoch's steps.
    """
    logits_LV = predictions.logits_LV.float()
    return (logits_LV.max(-1).values - logits_LV.mean(-1)).square()
