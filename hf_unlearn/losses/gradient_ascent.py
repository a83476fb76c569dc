"""Gradient ascent, alone and with a retain term, and random relabelling."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_unlearn.data.row_identity import batch_hashes
from hf_unlearn.errors import DataError
from hf_unlearn.losses.registry import register_loss
from hf_unlearn.models.forward import Predictions


@register_loss("kl_min", needs_retain=True, alpha=1.0, retain="kl")
@register_loss("grad_diff", needs_retain=True, alpha=1.0)
@register_loss("grad_ascent")
def negative_likelihood(predictions: Predictions, original: None) -> Tensor:
    """Return minus the negative log-likelihood of each label (Thudi et al., EuroS&P 2022; Liu et al., CoLLAs 2022).

    The retain term of `kl_min` is KL(original || model) ("KL minimisation": TOFU, Maini et al., COLM 2024, section 3),
    computed at label positions; open-unlearning also counts prompts and padding, and divides by rows.
    """
    return -predictions.nll_L


@register_loss("random_label", labels="class")
def random_label(predictions: Predictions, original: None, *, seed: int = 0) -> Tensor:
    """Return the cross-entropy to another class that is drawn uniformly for each row.

    Graves et al., AAAI 2021, "Amnesiac", section 4. The draw depends only on the row's content and `seed`, so it is the
    same in every epoch, batch and process, and after a restart.
    """
    assert predictions.inputs is not None
    classes = predictions.logits_LV.shape[1]
    if classes < 2:
        raise DataError("random_label needs a second class to draw, but the model has one; use another loss")
    hashes = batch_hashes(predictions.inputs)
    shifts_B = torch.tensor([1 + _uniform(row, seed, classes - 1) for row in hashes])
    shifts_L = shifts_B.to(predictions.labels_L.device)[predictions.rows_L]
    drawn_L = (predictions.labels_L + shifts_L) % classes
    return F.cross_entropy(predictions.logits_LV.float(), drawn_L, reduction="none")


def _uniform(row: int, seed: int, below: int) -> int:
    """Return one of `0, ..., below - 1`, drawn by a generator that is seeded with a row's hash and a seed."""
    generator = torch.Generator().manual_seed((row ^ (seed * 0x9E3779B97F4A7C15)) % (1 << 63))
    return int(torch.randint(below, (), generator=generator))
