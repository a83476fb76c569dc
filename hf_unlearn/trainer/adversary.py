"""An attacker within training: a few steps of relearning on some forget rows, undone afterwards.

What is forgotten at the current weights comes back after some steps on a few of the rows (Hu et al., ICLR 2025, arXiv
2406.13356). A gradient that is taken after those steps, on *other* rows, and applied to the weights before them, keeps
the rows forgotten after the attack too: a first-order form of tamper-resistance training (TAR, Tamirisa et al., ICLR
2025, arXiv 2408.00761, section 4).

That alone ends far below what a model that never saw the rows would give them, which reveals that they were forgotten.
`row_stopping.RowStopping` therefore also holds the rows from below.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from hf_unlearn.constraints.step_constrainer import StepConstrainer
from hf_unlearn.models.forward import predict
from hf_unlearn.models.modes import eval_mode
from hf_unlearn.models.tasks import Batch


@contextmanager
def relearned_weights(
    model: nn.Module, constrainer: StepConstrainer, batch: Batch, steps: int, learning_rate: float
) -> Iterator[None]:
    """Give the model the weights it has after relearning `batch`, within the context; every process attacks alone.

    Each step moves every trained weight by `learning_rate` against the sign of the gradient of the mean loss per label,
    as Adam's first steps do. The `.grad` of parameters does not change, and the weights are restored at the end, after
    an exception too.

    Args:
        model: The model itself and not a wrapper of it (DDP).
        constrainer: Gives the trained weights; every process needs complete weights.
        batch: The attacker's rows as model inputs, with `labels` `[B, T]` or `[B]`.
        steps: Number of steps; 0 changes nothing.
        learning_rate: How far a step moves each weight.
    """
    before = constrainer.copy_weights()
    try:
        for _ in range(steps):
            _relearn(model, [part.parameter for part in constrainer.weights], batch, learning_rate)
        yield
    finally:
        constrainer.restore(before)
        torch.clear_autocast_cache()


def _relearn(model: nn.Module, weights: Sequence[nn.Parameter], batch: Batch, learning_rate: float) -> None:
    with torch.enable_grad(), eval_mode(model):
        loss = predict(model, batch).nll_L.mean()
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)  # does not touch .grad, nor DDP's hooks
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                weight.sub_(gradient.sign(), alpha=learning_rate)
    torch.clear_autocast_cache()  # autocast would keep using its low-precision copies of the old weights
