"""PDU: flat logits, with a bound on the retain loss."""

from torch import Tensor

from hf_unlearn.losses.registry import register_loss
from hf_unlearn.models.forward import Predictions


@register_loss("pdu", needs_retain=True, dual_weight=True, alpha=1.0)
def pdu(predictions: Predictions, original: None) -> Tensor:
    """Return `(max z - mean z)^2` per label, where z are its logits; the retain term has a dual weight.

    Entesari et al., arXiv 2506.05314: minimise this subject to a retain loss of at most `eps`, with a dual weight (see
    `DualWeight`). The constant `-weight * eps` of the Lagrangian is left out because it has no gradient.
    open-unlearning masks the logits *at* the label positions, one to the right of those that predict the labels; here
    the predicting ones are used. Its update per epoch makes another pass over the retain rows; here it uses the mean
    over the epoch's steps.
    """
    logits_LV = predictions.logits_LV.float()
    return (logits_LV.max(-1).values - logits_LV.mean(-1)).square()
