"""Losses that compare likelihoods of answers: negative and direct preference optimisation.

S is the summed negative log-likelihood of a row; a larger S means more forgotten.
"""

import torch.nn.functional as F
from torch import Tensor

from hf_unlearn.losses.registry import register_loss
from hf_unlearn.models.forward import Predictions


@register_loss("npo", unit="row", reads_original="nll", alpha=1.0)
def npo(predictions: Predictions, original: Predictions, *, beta: float = 0.1) -> Tensor:
    """Return `-(2 / beta) log sigmoid(beta (S - S_original))` per row (Zhang et al., COLM 2024, equation 3)."""
    return -(2 / beta) * F.logsigmoid(beta * _change(predictions, original))


@register_loss("simnpo", unit="row", gamma=0.125, alpha=1.0)
def simnpo(predictions: Predictions, original: None, *, beta: float = 4.5, delta: float = 0.0) -> Tensor:
    """Return `-(2 / beta) log sigmoid(beta (S / length - delta))` per row.

    SimNPO, Fan et al., arXiv 2410.07163, section 4. The paper writes
    `- (2 / beta) log sigmoid(-beta / |y| log p(y) - gamma)`: its margin gamma is `beta * delta` here, as in
    open-unlearning. The length is the number of predicted labels.
    """
    mean_B = predictions.sum_by_row(predictions.nll_L) / predictions.lengths_B.clamp(min=1)
    return -(2 / beta) * F.logsigmoid(beta * (mean_B - delta))


@register_loss("idk", unit="row", labels="token", reads_original="nll", alternate_answer="idk", alpha=1.0)
@register_loss("altpo", unit="row", labels="token", reads_original="nll", alternate_answer="own", alpha=1.0)
@register_loss("dpo", unit="row", labels="token", reads_original="nll", alternate_answer="own", alpha=1.0)
def dpo(predictions: Predictions, original: Predictions, *, beta: float = 0.1) -> Tensor:
    """Return `-(2 / beta) log sigmoid(beta ((S - S_original) - (S' - S'_original)))` per row.

    S' is the sum for the row's alternate answer. This is direct preference of the alternate answer over the forget
    answer (Rafailov et al., NeurIPS 2023, equation 7) with NPO's factor `2 / beta`, as in open-unlearning; the paper
    has the factor 1. `dpo` and `altpo` (Mekala et al., COLING 2025) use each row's own alternate answer, `idk` (TOFU,
    Maini et al., COLM 2024, section 3) one that says "I don't know".
    """
    assert predictions.alternate is not None and original.alternate is not None
    margin_B = _change(predictions, original) - _change(predictions.alternate, original.alternate)
    return -(2 / beta) * F.logsigmoid(beta * margin_B)


def _change(predictions: Predictions, original: Predictions) -> Tensor:
    """Return `S - S_original` of each row."""
    return predictions.sum_by_row(predictions.nll_L) - original.sum_by_row(original.nll_L)
