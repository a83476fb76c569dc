"""Losses with a target distribution from which the true label is removed, or in which it is lowered."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_unlearn.losses.registry import register_loss
from hf_unlearn.models.forward import Predictions


def without_label(logits_LV: Tensor, labels_L: Tensor) -> Tensor:
    """Return the softmax of the logits with the true label at minus infinity: `[L, V]`, detached."""
    return logits_LV.detach().float().scatter(1, labels_L.unsqueeze(1), -torch.inf).softmax(-1)


@register_loss("ce_u", skip_first=True)
def ce_u(predictions: Predictions, original: None) -> Tensor:
    """Return the cross-entropy to the current prediction with the true label removed, per label.

    The first token of an answer is skipped, unless the answer has fewer than three labels: one token and an end token
    would leave nothing that it says. Token classifiers have no answers, so every label counts. Yang, CE-U, arXiv
    2503.01224.
    """
    target_LV = without_label(predictions.logits_LV, predictions.labels_L)
    return F.cross_entropy(predictions.logits_LV.float(), target_LV, reduction="none")


@register_loss("next_best", reads_original="logits")
def next_best(predictions: Predictions, original: Predictions) -> Tensor:
    """Return the cross-entropy to the *original* model's prediction with the true label removed, per label.

    METHOD, section 3.
    """
    target_LV = without_label(original.logits_LV, predictions.labels_L)
    return F.cross_entropy(predictions.logits_LV.float(), target_LV, reduction="none")


@register_loss("undial", reads_original="logits")
def undial(predictions: Predictions, original: Predictions, *, beta: float = 10.0) -> Tensor:
    """Return the cross-entropy to `softmax(z_original - beta * onehot(label))` per label.

    UnDIAL, Dong et al., NAACL 2025, section 3. open-unlearning also counts prompts and padding, where its mask of -100
    lowers the logit of an unrelated token; here only labels count.
    """
    z_LV = original.logits_LV.float()
    lowered_LV = z_LV.scatter_add(1, predictions.labels_L.unsqueeze(1), z_LV.new_full((len(z_LV), 1), -beta))
    return F.cross_entropy(predictions.logits_LV.float(), lowered_LV.softmax(-1), reduction="none")
