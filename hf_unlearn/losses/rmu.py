"""Representation misdirection."""

import torch
from torch import Tensor

from hf_unlearn.errors import ModelError
from hf_unlearn.losses.registry import register_loss
from hf_unlearn.models.forward import Predictions


@register_loss("rmu", reads_hidden=True, alpha=1.0, retain="hidden")
def rmu(predictions: Predictions, original: None, *, coefficient: float = 2.0, seed: int = 0) -> Tensor:
    """Mean squared distance of the output of `layer` to `coefficient * u / |u|`, u uniform in [0, 1)^D, per label.

    RMU (WMDP, Li et al., ICML 2024, section 4). `layer` is a block's number or a module's name; weights after it
    have a zero gradient, and `train_only` picks some of the others (the paper's: three down projections). Read are the
    states that predict the labels (of a class label: those of all unmasked positions); the paper's code reads all
    positions, open-unlearning the states *at* the labels and a mean per row first. `u` is fixed by `seed`, the same
    on each process.
    """
    hidden = predictions.hidden
    assert hidden is not None
    if torch.is_grad_enabled() and not hidden.states_LPD.requires_grad:
        raise ModelError(
            "the output of rmu's layer depends on no trained weight (all before it are frozen, or gradient "
            "checkpointing is reentrant); choose a later layer"
        )
    direction_D = torch.rand(hidden.states_LPD.shape[-1], generator=torch.Generator().manual_seed(seed))
    target_D = coefficient * direction_D / direction_D.norm()
    # zero, but with a path to every weight, for which data parallel processes wait
    return hidden.distance(target_D.to(hidden.states_LPD.device)) + 0 * predictions.nll_L
