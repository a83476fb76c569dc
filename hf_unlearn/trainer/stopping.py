"""When to stop: forgotten as far as never-seen rows, or what the retain rows may drift or lose is used up."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_unlearn.constraints.step_constrainer import StepConstrainer
from hf_unlearn.trainer.row_stopping import Band


class OverUnlearningCallback(TrainerCallback):
    """Stop where forget rows look like rows that were never seen (PGU, WACV 2024, section 3.5).

    To forget more than a model that never saw the rows is itself a leak. The mark is the metric on held-out rows under
    the *original* model: a run that harms held-out rows must not go after its own damage. The last step is halved
    until it ends within `TOLERANCE` beyond the mark, `HALVINGS` times at most; constraints are linear, so that every
    point of a step is as allowed as its end. With a fixed `target` the run stops at the first evaluation that reaches
    it. Single rows stop before (`band.Band`): those that have reached the mark are left alone.

    Against an attacker the metric is that after relearning. Without a target rows are held from both sides: the run
    stops at the first evaluation where they are, without an attack, not below the band in the mean either. With one all
    rows are pushed.

    Needs evaluations of `forget`.

    Args:
        constrainer: Holds the weights, now and at first.
        metric: `loss` rises to the mark, the others fall to it.
        score: Value of the metric, or of one that is named, on the split `forget` or `holdout` under the weights of the
            moment.
        target: A fixed mark.
        relearned: Go by the forget rows after an attacker's relearning (`adversary_steps`); so does `score`.
        by_row: Leave single rows alone that have reached the mark.

    Attributes:
        band: What holds the rows, from the beginning of a run on; None where all are pushed.
    """

    HALVINGS, TOLERANCE = 6, 0.02

    def __init__(
        self,
        constrainer: StepConstrainer,
        metric: str,
        score: Callable[..., float],
        target: float | None = None,
        relearned: bool = False,
        by_row: bool = True,
    ):
        self.constrainer, self.metric, self.score, self.target = constrainer, metric, score, target
        self.mark, self.relearned, self.by_row = target, relearned, by_row
        self.watched = f"relearned_{metric}" if relearned else metric
        self.band: Band | None = None
        self.reason: str | None = None
        self.previous: tuple[int, list[Tensor]] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.mark is None:
            with self.constrainer.original():
                self.mark = self.score("holdout")
        if self.by_row and not self.relearned:
            self.band = Band(self.constrainer, self.metric, self.mark)
        elif self.by_row and self.target is None:
            self.band = self._both_sides()
        if self.previous is None:  # else of the checkpoint that this run resumes
            self.previous = (state.global_step, self.constrainer.copy_weights())

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict, **kwargs: Any
    ) -> None:
        forget = metrics.get(f"eval_forget_{self.watched}")
        if forget is None or self.mark is None:
            return
        step: float = state.global_step
        least = self.band.lowest if self.band is not None else None
        too_low = least is not None and metrics.get("eval_forget_probability", math.inf) < least
        if not self._reached(forget) or too_low:
            self.previous = (state.global_step, self.constrainer.copy_weights())
            return
        if self.target is None and least is None and self.previous is not None and self.previous[0] < state.global_step:
            forget, step = self._shorten(forget, *self.previous, state.global_step)
        control.should_training_stop = True
        mark = "the target" if self.target is not None else "what held-out rows had before,"
        self.reason = f"forget {self.watched} {forget:.4f} reached {mark} {self.mark:.4f} at step {step:g}"

    def _reached(self, forget: float) -> bool:
        assert self.mark is not None
        return forget >= self.mark if self.metric == "loss" else forget <= self.mark

    def _both_sides(self) -> Band:
        """A band around the mean probability of held-out rows under the original model."""
        if self.metric == "probability":
            assert self.mark is not None
            return Band.against_relearning(self.constrainer, self.mark)
        with self.constrainer.original():
            return Band.against_relearning(self.constrainer, self.score("holdout", "probability"))

    def _shorten(self, forget: float, before: int, start: list[Tensor], after: int) -> tuple[float, float]:
        """Go back from the end of the last stretch to a point that has just reached the mark."""
        assert self.mark is not None
        end = self.constrainer.copy_weights()
        low, high = 0.0, 1.0
        for _ in range(self.HALVINGS):
            if abs(forget - self.mark) <= self.TOLERANCE:
                break
            middle = (low + high) / 2
            self._place(start, end, middle)
            found = self.score("forget")
            if self._reached(found):
                high, forget = middle, found
            else:
                low = middle
        self._place(start, end, high)
        return forget, before + high * (after - before)

    def _place(self, start: list[Tensor], end: list[Tensor], share: float) -> None:
        self.constrainer.restore([a.lerp(b, share) for a, b in zip(start, end, strict=True)])


class DriftBudgetCallback(TrainerCallback):
    """Stop before the predicted retain drift exceeds a budget; the weights of the last step within it are kept."""

    def __init__(self, constrainer: StepConstrainer, max_retain_drift: float):
        self.constrainer, self.budget = constrainer, max_retain_drift
        self.reason: str | None = None
        self._within: list[Tensor] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._within = self.constrainer.copy_weights()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        drift = self.constrainer.drift().relative
        if drift <= self.budget:
            self._within = self.constrainer.copy_weights()
            return
        self.constrainer.restore(self._within)
        control.should_training_stop = True
        self.reason = f"step {state.global_step} would drift {drift:.4f}, above max_retain_drift {self.budget}; undone"


class RetainDropCallback(TrainerCallback):
    """Stop before retain rows lose more of a metric than a budget; the last weights seen within it are kept.

    The rule of PGU's authors for whole classes (`unlearn_class.py`: 5 points of accuracy), who keep the epoch that
    broke it. It reads retain rows. Needs evaluations of `retain`.

    Args:
        constrainer: Holds the weights, now and at first.
        metric: `loss` is better when low, the others when high.
        score: Value of the metric on the split `retain` under the weights of the moment.
        max_drop: The budget, in the metric's own unit, from its value under the original model.
    """

    def __init__(self, constrainer: StepConstrainer, metric: str, score: Callable[[str], float], max_drop: float):
        self.constrainer, self.metric, self.score, self.budget = constrainer, metric, score, max_drop
        self.reason: str | None = None
        self._before = 0.0
        self._within: list[Tensor] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        with self.constrainer.original():
            self._before = self.score("retain")
        self._within = self.constrainer.copy_weights()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict, **kwargs: Any
    ) -> None:
        retain = metrics.get(f"eval_retain_{self.metric}")
        if retain is None:
            return
        drop = retain - self._before if self.metric == "loss" else self._before - retain
        if drop <= self.budget:
            self._within = self.constrainer.copy_weights()
            return
        self.constrainer.restore(self._within)
        control.should_training_stop = True
        self.reason = (
            f"retain {self.metric} {retain:.4f} at step {state.global_step} is {drop:.4f} worse than before, above "
            f"max_retain_drop {self.budget}; undone"
        )
