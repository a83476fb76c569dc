"""Forget rows that are forgotten far enough are left alone, each by its own metric.

A mean over rows says little about one of them: when it reaches what held-out rows have, some rows may be far below, and
the mean be made of a few others. Our own; measured in recipes/README.md.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from hf_unlearn.constraints.step_constrainer import StepConstrainer
from hf_unlearn.core.processes import sum_over_processes, world
from hf_unlearn.evaluation.metrics import row_scores
from hf_unlearn.evaluation.metrics.rows import RowScores
from hf_unlearn.models.forward import predict
from hf_unlearn.models.modes import eval_mode
from hf_unlearn.models.tasks import Batch

COLUMNS = {field.name: index for index, field in enumerate(fields(RowScores))}


class Band:
    """Of each batch those rows are pushed that have not reached the mark; very improbable ones may be pulled up.

    Where no row asks, nothing moves. Where rows are pushed and others pulled, the gradients are brought to norms in the
    ratio of the shares of rows that ask. Against an attacker (`against_relearning`) what the two agree on cancels, and
    what remains changes how much comes back in an attack rather than how much is known without one.

    Args:
        constrainer: Knows the trained weights.
        metric: `probability`, `accuracy` or `loss`, of a row as in `RowScores`.
        mark: Rows beyond it are left alone: above it for `loss`, at or below it for the others.
        lowest: Rows of a lower probability (`exp` of minus the mean loss per label) are pulled up by their likelihood,
            which needs whole weights on each process; None pulls none.
    """

    UPPER, LOWER = 0.9, 0.5

    def __init__(self, constrainer: StepConstrainer, metric: str, mark: float, lowest: float | None = None):
        self.constrainer, self.metric, self.mark, self.lowest = constrainer, metric, mark, lowest
        self._begin()

    @classmethod
    def against_relearning(cls, constrainer: StepConstrainer, level: float) -> "Band":
        """Rows are pushed that an attack brings above `UPPER` of `level`, and pulled that are below `LOWER` of it.

        `level` is the mean probability of never-seen rows.
        """
        return cls(constrainer, "probability", cls.UPPER * level, cls.LOWER * level)

    def _begin(self) -> None:
        self._pull: list[Tensor] = []
        self._asked: dict[str, Tensor] = {
            name: torch.zeros(2, dtype=torch.float64) for name in ("push", "pull")
        }  # rows that ask, and all, since the last step

    @property
    def _weights(self) -> list[nn.Parameter]:
        return [part.parameter for part in self.constrainer.weights]

    def pull(self, model: nn.Module, batch: Batch) -> None:
        """Add the gradient of those rows of `batch` (with `labels` `[B, T]` or `[B]`) that are too improbable."""
        if self.lowest is None:
            return
        with torch.enable_grad(), eval_mode(model):
            predictions = predict(model, batch)
            low_B = row_scores(predictions)[:, COLUMNS["probability"]] < self.lowest
            self._count("pull", low_B)
            if not low_B.any():
                return
            low_L = low_B[predictions.rows_L]
            loss = predictions.nll_L[low_L].sum() / len(low_L)
            gradients = torch.autograd.grad(loss, self._weights, allow_unused=True)
        self._pull = self._pull or [torch.zeros_like(weight) for weight in self._weights]
        for mine, gradient in zip(self._pull, gradients, strict=True):
            if gradient is not None:
                mine.add_(gradient)

    def to_push(self, model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Mapping[str, Any], bool]:
        """The parts of a step, with those forget rows (and their alternates) that have not reached the mark.

        With all of them, and False, where none is left: a pass that is to count for nothing, but that other processes
        wait for.
        """
        with torch.no_grad(), eval_mode(model):
            score_B = row_scores(predict(model, inputs["forget"]))[:, COLUMNS[self.metric]]
        asks_B = ~(
            score_B >= self.mark if self.metric == "loss" else score_B <= self.mark
        )  # NaN asks: it is to be told
        self._count("push", asks_B)
        if not asks_B.any():
            return inputs, False
        rows = {name: _chosen(part, asks_B) for name, part in inputs.items() if name in ("forget", "alternate")}
        return {**inputs, **rows}, True

    def _count(self, name: str, asked_B: Tensor) -> None:
        self._asked[name] += torch.tensor([int(asked_B.sum()), len(asked_B)], dtype=torch.float64)

    def end_step(self) -> None:
        """Before the last backward pass of a step: whether any row, of any process, asks for a move."""
        if world()[1] > 1:
            sum_over_processes(self._asked)
        self.constrainer.skip_next_step = not any(asked[0] for asked in self._asked.values())

    @torch.no_grad()
    def combine(self) -> None:
        """After it: add what pulls to the gradients of what pushes."""
        if self._asked["pull"][0]:
            self._add_pull(*((asked / rows).item() if rows else 0.0 for asked, rows in self._asked.values()))
        self._begin()

    def _add_pull(self, push: float, pull: float) -> None:
        weights = self._weights
        if world()[1] > 1:
            self._pull = self._pull or [torch.zeros_like(weight) for weight in weights]
            sum_over_processes({f"{i:06}": gradient for i, gradient in enumerate(self._pull)})
        scale = 1 / world()[1]
        if push:
            pushing = [weight.grad for weight in weights if weight.grad is not None]
            size, other = (torch.stack(torch._foreach_norm(gradients)).norm() for gradients in (pushing, self._pull))
            scale = (pull * size / (push * other)).item()
        for weight, gradient in zip(weights, self._pull, strict=True):
            weight.grad = gradient * scale if weight.grad is None else weight.grad.add_(gradient, alpha=scale)


def _chosen(part: Mapping[str, Any], rows_B: Tensor) -> dict[str, Any]:
    return {name: value[rows_B] if isinstance(value, Tensor) else value for name, value in part.items()}
