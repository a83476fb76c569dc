"""Negative preference optimisation."""

import torch.nn.functional as F
from torch import Tensor

from hf_unlearn.losses.base import register_loss
from hf_unlearn.predictions import Predictions


@register_loss("npo", unit="row", needs_original=True, alpha=1.0)
def npo(predictions: Predictions, original: Predictions, *, beta: float = 0.1) -> Tensor:
    """`-(2 / beta) log sigmoid(beta (S - S_original))` per row, S the row's summed negative log-likelihood.

    Zhang et al., COLM 2024, equation 3. A larger S is more forgotten.
    """
    change_B = predictions.sum_by_row(predictions.nll_L) - original.sum_by_row(original.nll_L)
    return -(2 / beta) * F.logsigmoid(beta * change_B)
