"""RMU: representation misdirection."""

import torch
from torch import Tensor

from hf_unlearn.errors import ModelError
from hf_unlearn.losses.registry import register_loss
from hf_unlearn.models.forward import Predictions


@register_loss("rmu", reads_hidden=True, alpha=1.0, retain="hidden")
def rmu(predictions: Predictions, original: None, *, coefficient: float = 2.0, seed: int = 0) -> Tensor:
    """Return the mean squared distance of the output of `layer` to `coefficient * u / |u|`, per label.

    RMU (WMDP, Li et al., ICML 2024, section 4); u is uniform in [0, 1)^D. `layer` is the number of a block or the name
    of a module. Weights after it have a zero gradient, and `train_only` selects some of the others (in the paper: three
    down projections). The loss reads the states that predict the labels (for a class label: those of all unmasked
    positions); the paper's code reads all positions, and open-unlearning reads the states *at* the labels and averages
    per row first. `u` is determined by `seed` and is the same on each process.
    """
    hidden = predictions.hidden
    assert hidden is not None
    if torch.is_grad_enabled() and not hidden.states_LPD.requires_grad:
        raise ModelError(
            "the output of rmu's layer does not depend on a trainable weight (all before it are frozen, or gradient "
            "checkpointing is reentrant); choose a later layer"
        )
    direction_D = torch.rand(hidden.states_LPD.shape[-1], generator=torch.Generator().manual_seed(seed))
    target_D = coefficient * direction_D / direction_D.norm()
    # adds zero, but connects every weight to the loss, because data-parallel processes wait for every gradient
    return hidden.distance(target_D.to(hidden.states_LPD.device)) + 0 * predictions.nll_L
