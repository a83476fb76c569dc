"""An attacker within training: a few steps of relearning on some forget rows, undone afterwards.

What is pushed down at the weights themselves comes back after some steps on a few of the rows (Hu et al., ICLR 2025,
arXiv 2406.13356). A gradient that is taken where those steps lead, on *other* rows, and applied to the weights before
them, makes the rows stay forgotten there too: a first-order form of tamper-resistance training (TAR, Tamirisa et al.,
ICLR 2025, arXiv 2408.00761, section 4).

That alone ends far below what a model that never saw the rows would give them, which tells that they were forgotten.
`Band` keeps them there from both sides, where held-out rows say what that is.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_unlearn.metrics import row_scores
from hf_unlearn.optimizer import StepConstrainer
from hf_unlearn.predictions import Batch, eval_mode, predict
from hf_unlearn.sharding import sum_over_processes, world


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
    before = constrainer.weights()
    try:
        for _ in range(steps):
            _relearn(model, [part.parameter for part in constrainer.parts], batch, learning_rate)
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


class Band:
    """Holds forget rows between two shares of the probability that rows like them, never seen, have.

    A row above `UPPER` of it *after* an attack is pushed down by the loss, one below `LOWER` of it *without* one is
    pulled up by its likelihood, and others are left alone. Where both are asked for, their gradients are brought to
    norms in the ratio of the shares of rows that ask: what the two agree on cancels, and what remains changes how much
    comes back in an attack rather than how much is known without one. Our own; measured in recipes/README.md, "Staying
    forgotten". A row's probability is `exp` of minus its mean loss per label, in nats.

    Args:
        constrainer: Knows the trained weights; they must be whole on each process.
        level: Mean probability of never-seen rows, in (0, 1).
    """

    UPPER, LOWER = 0.9, 0.5

    def __init__(self, constrainer: StepConstrainer, level: float):
        self.weights = [part.parameter for part in constrainer.parts]
        self.highest, self.lowest = (
            -math.log(max(share * level, sys.float_info.min)) for share in (self.UPPER, self.LOWER)
        )
        self._begin()

    def _begin(self) -> None:
        self._pull: list[Tensor] = []
        self._asked: dict[str, Tensor] = {
            name: torch.zeros(2, dtype=torch.float64) for name in ("push", "pull")
        }  # rows that ask, and all, since the last step

    def pull(self, model: nn.Module, batch: Batch) -> None:
        """Add the gradient of those rows of `batch` (with `labels` `[B, T]` or `[B]`) that are too improbable."""
        with torch.enable_grad(), eval_mode(model):
            predictions = predict(model, batch)
            low_B = row_scores(predictions)[:, 0] > self.lowest
            self._count("pull", low_B)
            if not low_B.any():
                return
            low_L = low_B[predictions.rows_L]
            loss = predictions.nll_L[low_L].sum() / len(low_L)
            gradients = torch.autograd.grad(loss, self.weights, allow_unused=True)
        self._pull = self._pull or [torch.zeros_like(weight) for weight in self.weights]
        for mine, gradient in zip(self._pull, gradients, strict=True):
            if gradient is not None:
                mine.add_(gradient)

    def to_push(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
        """The parts of a step, of the forget rows those that are too probable; all of them, and False, if none is."""
        with torch.no_grad(), eval_mode(model):
            high_B = row_scores(predict(model, inputs["forget"]))[:, 0] < self.highest
        self._count("push", high_B)
        if not high_B.any():
            return inputs, False
        parts = {name: {key: value[high_B] for key, value in part.items()} for name, part in inputs.items()}
        return parts, True

    def _count(self, name: str, asked_B: Tensor) -> None:
        self._asked[name] += torch.tensor([int(asked_B.sum()), len(asked_B)], dtype=torch.float64)

    @torch.no_grad()
    def combine(self) -> None:
        """Add what pulls to the gradients of what pushes, once in a step; without either they are None: no move."""
        if world()[1] > 1:
            self._pull = self._pull or [torch.zeros_like(weight) for weight in self.weights]
            sum_over_processes(self._asked | {f"{i:06}": gradient for i, gradient in enumerate(self._pull)})
        push, pull = ((asked / rows).item() if rows else 0.0 for asked, rows in self._asked.values())
        pushing = [weight.grad for weight in self.weights if weight.grad is not None]
        if not push and not pull:
            for weight in self.weights:
                weight.grad = None
        elif pull:
            size, other = (torch.stack(torch._foreach_norm(g)).norm() for g in (pushing, self._pull))
            scale = (pull * size / (push * other)).item() if push else 1 / world()[1]
            for weight, gradient in zip(self.weights, self._pull, strict=True):
                weight.grad = gradient * scale if weight.grad is None else weight.grad.add_(gradient, alpha=scale)
        self._begin()
