"""An attacker within training: a few steps of relearning on some forget rows, undone afterwards.

What is pushed down at the weights themselves comes back after some steps on a few of the rows (Hu et al., ICLR 2025,
arXiv 2406.13356). A gradient that is taken where those steps lead, on *other* rows, and applied to the weights before
them, makes the rows stay forgotten there too: a first-order form of tamper-resistance training (TAR, Tamirisa et al.,
ICLR 2025, arXiv 2408.00761, section 4).

That alone ends far below what a model that never saw the rows would give them, which tells that they were forgotten:
`band.Band` holds them from below as well.
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
def relearned(
    model: nn.Module, constrainer: StepConstrainer, batch: Batch, steps: int, learning_rate: float
) -> Iterator[None]:
    """The model as it is after relearning `batch`, for the duration of the context; every process attacks alone.

    Each step moves every trained weight by `learning_rate` against the sign of the gradient of the mean loss per label,
    as Adam's first steps do. Parameters' `.grad` is left alone, and the weights are back at the end, on errors too.

    Args:
        model: The model, not a wrapper of it (DDP).
        constrainer: Knows the trained weights; they must be whole on each process.
        batch: The attacker's rows as the model takes them, with `labels` `[B, T]` or `[B]`.
        steps: How many steps; 0 changes nothing.
        learning_rate: Size of a step in each weight.
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
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)  # which leaves .grad, and DDP, alone
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                weight.sub_(gradient.sign(), alpha=learning_rate)
    torch.clear_autocast_cache()  # autocast would go on with its low-precision copies of the other weights
