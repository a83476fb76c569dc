"""Row stopping: forget rows that are forgotten far enough are left alone, each by its own metric.

A mean over rows says little about a single row: when it reaches the mean of held-out rows, some rows may be far below
it, and others far above. This rule is our own; its measurements are in docs/results/relearning.md.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from hf_unlearn.constraints.step_constrainer import StepConstrainer
from hf_unlearn.core.processes import sum_over_processes, world
from hf_unlearn.evaluation.row_scores import RowScores, score_predictions
from hf_unlearn.models.forward import predict
from hf_unlearn.models.modes import eval_mode
from hf_unlearn.models.tasks import Batch

COLUMNS = {field.name: index for index, field in enumerate(fields(RowScores))}


class RowStopping:
    """Push only those rows of a batch that have not reached the mark, and pull up rows that are too improbable.

    A row is pushed if it takes part in the forget loss, and pulled if its likelihood is raised. If no row of a step is
    pushed or pulled, the weights do not move. If some rows are pushed and others pulled, the two gradients are scaled
    to norms in the ratio of the shares of rows. Against an attacker (`against_relearning`) what the two gradients have
    in common cancels, and the rest changes how much an attack brings back rather than how much is known without one.

    Each micro-batch calls `accumulate_pull` and `select_pushed`; the last one of a step then calls
    `decide_whether_to_move` before its backward pass and `add_pull` after it.

    Args:
        constrainer: Gives the trained weights.
        metric: `probability`, `accuracy` or `loss`, of a row as in `RowScores`.
        mark: Rows that have reached it are left alone: at or above it for `loss`, at or below it for the others.
        lowest: Rows of a lower probability (`exp` of minus the mean loss per label) are pulled up, for which every
            process needs complete weights; None pulls none.
    """

    UPPER, LOWER = 0.9, 0.5

    def __init__(self, constrainer: StepConstrainer, metric: str, mark: float, lowest: float | None = None):
        self.constrainer, self.metric, self.mark, self.lowest = constrainer, metric, mark, lowest
        self._begin_step()

    @classmethod
    def against_relearning(cls, constrainer: StepConstrainer, level: float) -> "RowStopping":
        """Push rows that an attack brings above `UPPER` of `level`, and pull rows that are below `LOWER` of it.

        `level` is the mean probability of never-seen rows.
        """
        return cls(constrainer, "probability", cls.UPPER * level, cls.LOWER * level)

    def _begin_step(self) -> None:
        self._pull: list[Tensor] = []
        self._counts: dict[str, Tensor] = {
            name: torch.zeros(2, dtype=torch.float64) for name in ("push", "pull")
        }  # number of rows that are pushed or pulled, and of all rows, since the last step

    @property
    def _weights(self) -> list[nn.Parameter]:
        return [part.parameter for part in self.constrainer.weights]

    def accumulate_pull(self, model: nn.Module, batch: Batch) -> None:
        """Add the gradient of the rows of `batch` (with `labels` `[B, T]` or `[B]`) that are too improbable."""
        if self.lowest is None:
            return
        with torch.enable_grad(), eval_mode(model):
            predictions = predict(model, batch)
            low_B = score_predictions(predictions)[:, COLUMNS["probability"]] < self.lowest
            self._count("pull", low_B)
            if not low_B.any():
                return
            low_L = low_B[predictions.rows_L]
            loss = predictions.nll_L[low_L].sum() / len(low_L)
            gradients = torch.autograd.grad(loss, self._weights, allow_unused=True)
        self._pull = self._pull or [torch.zeros_like(weight) for weight in self._weights]
        for pull, gradient in zip(self._pull, gradients, strict=True):
            if gradient is not None:
                pull.add_(gradient)

    def select_pushed(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[dict[str, Any], bool]:
        """Return the batches of a step with only those forget rows (and their alternates) that are pushed, and True.

        If no row is pushed, return all rows and False: other processes wait for the backward pass, but it must have no
        effect.
        """
        with torch.no_grad(), eval_mode(model):
            score_B = score_predictions(predict(model, inputs["forget"]))[:, COLUMNS[self.metric]]
        reached_B = score_B >= self.mark if self.metric == "loss" else score_B <= self.mark
        pushed_B = ~reached_B  # so that NaN is pushed: the loss then raises
        self._count("push", pushed_B)
        if not pushed_B.any():
            return inputs, False
        selected = {
            name: _select_rows(batch, pushed_B) for name, batch in inputs.items() if name in ("forget", "alternate")
        }
        return {**inputs, **selected}, True

    def _count(self, name: str, chosen_B: Tensor) -> None:
        self._counts[name] += torch.tensor([int(chosen_B.sum()), len(chosen_B)], dtype=torch.float64)

    def decide_whether_to_move(self) -> None:
        """Keep the weights where they are if no process pushes or pulls a row; call before a step's last backward."""
        if world()[1] > 1:
            sum_over_processes(self._counts)
        self.constrainer.skip_next_step = not any(count[0] for count in self._counts.values())

    @torch.no_grad()
    def add_pull(self) -> None:
        """Add the pulling gradient to the pushing one; call after a step's last backward pass."""
        if self._counts["pull"][0]:
            push_share, pull_share = ((chosen / rows).item() if rows else 0.0 for chosen, rows in self._counts.values())
            self._add_scaled_pull(push_share, pull_share)
        self._begin_step()

    def _add_scaled_pull(self, push_share: float, pull_share: float) -> None:
        weights = self._weights
        if world()[1] > 1:
            self._pull = self._pull or [torch.zeros_like(weight) for weight in weights]
            sum_over_processes({f"{i:06}": gradient for i, gradient in enumerate(self._pull)})
        scale = 1 / world()[1]
        if push_share:
            push = [weight.grad for weight in weights if weight.grad is not None]
            push_norm, pull_norm = (torch.stack(torch._foreach_norm(grads)).norm() for grads in (push, self._pull))
            scale = (pull_share * push_norm / (push_share * pull_norm)).item()
        for weight, gradient in zip(weights, self._pull, strict=True):
            weight.grad = gradient * scale if weight.grad is None else weight.grad.add_(gradient, alpha=scale)


def _select_rows(batch: Mapping[str, Any], rows_B: Tensor) -> dict[str, Any]:
    return {name: value[rows_B] if isinstance(value, Tensor) else value for name, value in batch.items()}
