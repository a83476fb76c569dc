"""A loss with a target: the prediction of a reference model that has not learnt the forget rows."""

import torch.nn.functional as F
from torch import Tensor

from hf_unlearn.losses.registry import register_loss
from hf_unlearn.models.forward import Predictions


@register_loss("to_reference", reads_reference="logits", alpha=3.0, retain="kl")
def to_reference(predictions: Predictions, reference: Predictions, *, huber: float = 0.5) -> Tensor:
    """Return `KL(reference || model) + huber * Huber(nll - nll of the reference)` per label.

    The reference is the checkpoint before the model was fine-tuned on the forget rows. Losses that push the label away
    make all of its tokens improbable, those that carry nothing first; a target keeps the language and drops the fact.
    The divergence is dominated by what the reference finds probable. The second term, quadratic up to a difference of
    one nat and linear beyond, also matches the probability of an improbable label. METHOD, section 7.

    >>> import torch
    >>> from hf_unlearn.models import Predictions
    >>> labels, rows = torch.tensor([0]), torch.tensor([0])
    >>> certain = Predictions(torch.tensor([[0.0, -1e4]]), labels, rows, n_rows=1)
    >>> even = Predictions(torch.zeros(1, 2), labels, rows, n_rows=1)
    >>> to_reference(even, certain, huber=0.0)  # log 2
    tensor([0.6931])
    >>> to_reference(certain, certain)
    tensor([0.])

    Args:
        predictions: Of the model, on the forget rows.
        reference: Of the reference model, on the same rows.
        huber: Weight of the second term.
    """
    log_p_LV, log_q_LV = (p.logits_LV.float().log_softmax(-1) for p in (reference, predictions))
    divergence_L = F.kl_div(log_q_LV, log_p_LV, reduction="none", log_target=True).sum(-1)
    return divergence_L + huber * F.huber_loss(predictions.nll_L, reference.nll_L, reduction="none")
