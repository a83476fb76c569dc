"""Stopping rules: forget rows look like rows that were never seen, or a budget for the retain rows is used up."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_unlearn.constraints.step_constrainer import StepConstrainer
from hf_unlearn.core.text import significant
from hf_unlearn.errors import SettingsError
from hf_unlearn.trainer.config import UnlearningConfig
from hf_unlearn.trainer.row_stopping import RowStopping

if TYPE_CHECKING:
    from hf_unlearn.trainer.reference import Reference

RISING = ("loss", "content_loss")
"""Metrics that rise while rows are forgotten; the others fall."""
CONTENT_SHARE = 0.7
"""Share of the reference model's loss on content tokens from which they count as forgotten."""
FUNCTION_MARGIN = 0.3
"""Nats by which the loss on function tokens may be above the reference model's."""


class SavedWeights(NamedTuple):
    """Copies of the trained weights after a step."""

    step: int
    weights: list[Tensor]


class OverUnlearningCallback(TrainerCallback):
    """Stop when forget rows look like rows that were never seen (PGU, WACV 2024, section 3.5).

    To forget more than a model that never saw the rows is itself a leak. The mark is the metric on held-out rows under
    the *original* model: a run that damages held-out rows must not follow its own damage. The last step is halved until
    it ends within `TOLERANCE` beyond the mark, at most `HALVINGS` times; constraints are linear, so that every point of
    a step is as allowed as its end. With a fixed `target` the run stops at the first evaluation that reaches it. Single
    rows stop earlier (`row_stopping.RowStopping`): those that have reached the mark are left alone.

    Against an attacker the metric is measured after relearning. Without a target, rows are then held from both sides:
    the run stops at the first evaluation where the metric has reached the mark and the mean probability without an
    attack is not below the lower bound of the rows. With a target all rows are pushed.

    With `content_loss` the mark is a share of the reference model's, which is its fixed target. The run then goes on
    while the other tokens, the function words, have a loss above `function_limit`: they are to be kept.

    Needs evaluations of `forget`.

    Args:
        constrainer: Gives the current and the original weights.
        metric: `loss` and `content_loss` rise to the mark, the others fall to it.
        score: `(split, metric) -> value` of the metric, by default this one, on the split `forget` or `holdout` under
            the current weights.
        target: A fixed mark.
        source_of_target: Where it comes from, in words.
        function_limit: Highest loss on function tokens with which the run may stop; None for any.
        relearned: Use the metric on forget rows after an attacker's relearning (`adversary_steps`); `score` must do
            the same.
        by_row: Leave single rows alone that have reached the mark.
        reads_metrics: Whether evaluations report the package's metrics. If false (own `compute_metrics`), the rule
            measures for itself at each evaluation of `forget`.

    Attributes:
        mark: The value at which to stop; without a target it is measured at the beginning of a run.
        before: The metric on the forget rows under the original model, measured by `measure_before`.
        row_stopping: Which rows are pushed; None before the first run and if all rows are pushed.
        last_short: The weights at the last evaluation that did not reach the mark, or at the beginning.
        reason: Why the run stopped, in words; None if this rule did not stop it.
    """

    HALVINGS, TOLERANCE = 6, 0.02

    def __init__(
        self,
        constrainer: StepConstrainer,
        metric: str,
        score: Callable[..., float],
        target: float | None = None,
        source_of_target: str = "forget_target",
        function_limit: float | None = None,
        relearned: bool = False,
        by_row: bool = True,
        reads_metrics: bool = True,
    ):
        self.constrainer, self.metric, self.score, self.target = constrainer, metric, score, target
        self.mark, self.relearned, self.by_row, self.reads_metrics = target, relearned, by_row, reads_metrics
        self.source_of_mark = "held-out rows before unlearning" if target is None else source_of_target
        self.function_limit = function_limit
        self.before: float | None = None
        self._too_low_before = False
        self.watched = f"relearned_{metric}" if relearned else metric
        self.row_stopping: RowStopping | None = None
        self.reason: str | None = None
        self.last_short: SavedWeights | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.reason = None
        self.measure_mark()
        assert self.mark is not None
        if self.by_row and not self.relearned:
            self.row_stopping = RowStopping(self.constrainer, self.metric, self.mark)
        elif self.by_row and self.target is None:
            self.row_stopping = self._stopping_from_both_sides()
        if self.last_short is None:  # a resumed run has that of its checkpoint
            self.last_short = SavedWeights(state.global_step, self.constrainer.copy_weights())

    def measure_mark(self) -> None:
        """Measure the mark on held-out rows under the original model, unless it is known."""
        if self.mark is None:
            with self.constrainer.original():
                self.mark = self.score("holdout")

    def measure_before(self) -> None:
        """Measure the forget rows under the original model, unless this was done before."""
        if self.before is None:
            with torch.random.fork_rng(devices=[]), self.constrainer.original():  # the order of the rows stays
                self.before = self.score("forget")
                if self.row_stopping is not None and self.row_stopping.lowest is not None:
                    probability = self.score("forget", "probability", attacked=False)
                    self._too_low_before = probability < self.row_stopping.lowest

    @property
    def nothing_to_forget(self) -> bool:
        """Whether the forget rows had reached the mark before the first step; false until it is measured.

        Against an attacker, rows below their lower bound are still to be pulled up.
        """
        return self.before is not None and self.has_reached(self.before) and not self._too_low_before

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict, **kwargs: object
    ) -> None:
        forget = self._evaluated(metrics)
        if forget is None or self.mark is None:
            return
        step: float = state.global_step
        lowest = self.row_stopping.lowest if self.row_stopping is not None else None
        too_low = lowest is not None and self._unattacked_probability(metrics) < lowest
        if not self.has_reached(forget) or too_low or self.breaks_function_words(self._function_loss(metrics)):
            self.last_short = SavedWeights(state.global_step, self.constrainer.copy_weights())
            return
        start = self.last_short
        if self.target is None and lowest is None and start is not None and start.step < state.global_step:
            forget, step = self._shorten(forget, start, state.global_step)
        control.should_training_stop = True
        mark = "the target" if self.target is not None else "what held-out rows had before,"
        value, aim = significant(forget, 4), significant(self.mark, 4)
        self.reason = f"forget {self.watched} {value} reached {mark} {aim} at step {step:g}"

    def _evaluated(self, metrics: dict) -> float | None:
        """Return the metric at an evaluation of the forget rows, or None at one of another split."""
        if self.reads_metrics:
            return metrics.get(f"eval_forget_{self.watched}")
        return self.score("forget") if is_evaluation_of("forget", metrics) else None

    def _function_loss(self, metrics: dict) -> float | None:
        """Return the loss on function tokens at an evaluation of the forget rows, if it is limited."""
        if self.function_limit is None:
            return None
        return metrics.get("eval_forget_function_loss") if self.reads_metrics else self.score("forget", "function_loss")

    def breaks_function_words(self, function_loss: float | None) -> bool:
        """Return whether the loss on function tokens is above its limit."""
        return self.function_limit is not None and function_loss is not None and function_loss > self.function_limit

    def _unattacked_probability(self, metrics: dict) -> float:
        """Return the mean probability of the forget rows without an attack."""
        if self.reads_metrics:
            return metrics.get("eval_forget_probability", math.inf)
        return self.score("forget", "probability", attacked=False)

    def has_reached(self, forget: float) -> bool:
        """Return whether this value of the metric has reached the mark."""
        assert self.mark is not None
        return forget >= self.mark if self.rises else forget <= self.mark

    @property
    def rises(self) -> bool:
        """Whether the metric rises while rows are forgotten."""
        return self.metric in RISING

    def _stopping_from_both_sides(self) -> RowStopping:
        """Return bounds around the mean probability of held-out rows under the original model."""
        if self.metric == "probability":
            assert self.mark is not None
            return RowStopping.against_relearning(self.constrainer, self.mark)
        with self.constrainer.original():
            return RowStopping.against_relearning(self.constrainer, self.score("holdout", "probability"))

    def _shorten(self, forget: float, start: SavedWeights, end_step: int) -> tuple[float, float]:
        """Go back from the current weights towards `start`, to a point that has just reached the mark.

        Returns:
            The forget metric there, and the step, a fraction.
        """
        assert self.mark is not None
        end = self.constrainer.copy_weights()
        low, high = 0.0, 1.0
        for _ in range(self.HALVINGS):
            if abs(forget - self.mark) <= self.TOLERANCE:
                break
            middle = (low + high) / 2
            self._interpolate(start.weights, end, middle)
            score = self.score("forget")
            if self.has_reached(score):
                high, forget = middle, score
            else:
                low = middle
        self._interpolate(start.weights, end, high)
        return forget, start.step + high * (end_step - start.step)

    def _interpolate(self, start: list[Tensor], end: list[Tensor], share: float) -> None:
        self.constrainer.restore([a.lerp(b, share) for a, b in zip(start, end, strict=True)])


class DriftBudgetCallback(TrainerCallback):
    """Stop before the predicted retain drift exceeds a budget; the weights of the last step within it are kept.

    Args:
        constrainer: Predicts the drift, and gives the weights.
        max_retain_drift: The budget, as relative drift.
    """

    setting = "max_retain_drift"

    def __init__(self, constrainer: StepConstrainer, max_retain_drift: float):
        self.constrainer, self.budget = constrainer, max_retain_drift
        self.reason: str | None = None
        self._within: list[Tensor] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.reason, self._within = None, self.constrainer.copy_weights()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        drift = self.constrainer.drift().relative
        if drift <= self.budget:
            self._within = self.constrainer.copy_weights()
            return
        self.constrainer.restore(self._within)
        control.should_training_stop = True
        self.reason = f"step {state.global_step} would drift {drift:.4f}, above max_retain_drift {self.budget}; undone"


class RetainDropCallback(TrainerCallback):
    """Stop before retain rows lose more of a metric than a budget; the last evaluated weights within it are kept.

    This is the rule of PGU's authors for entire classes (`unlearn_class.py`: 5 points of accuracy), who keep the epoch
    that exceeded it. It reads retain rows. Needs evaluations of `retain`.

    Args:
        constrainer: Gives the current and the original weights.
        metric: `loss` is better when low, the others when high.
        score: Value of the metric on the split `retain` under the current weights.
        max_drop: The budget, in the metric's own unit, from its value under the original model.
        reads_metrics: As in `OverUnlearningCallback`.
    """

    setting = "max_retain_drop"

    def __init__(
        self,
        constrainer: StepConstrainer,
        metric: str,
        score: Callable[[str], float],
        max_drop: float,
        reads_metrics: bool = True,
    ):
        self.constrainer, self.metric, self.score, self.budget = constrainer, metric, score, max_drop
        self.reads_metrics = reads_metrics
        self.reason: str | None = None
        self._before = 0.0
        self._within: list[Tensor] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        with self.constrainer.original():
            self._before = self.score("retain")
        self.reason, self._within = None, self.constrainer.copy_weights()

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict, **kwargs: object
    ) -> None:
        retain = metrics.get(f"eval_retain_{self.metric}") if self.reads_metrics else None
        if not self.reads_metrics and is_evaluation_of("retain", metrics):
            retain = self.score("retain")
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


def is_evaluation_of(split: str, metrics: Mapping[str, float]) -> bool:
    """Return whether these are the metrics of an evaluation of this split, whatever metrics were computed."""
    return f"eval_{split}_runtime" in metrics


def stopping_rules(
    args: UnlearningConfig,
    constrainer: StepConstrainer,
    score: Callable[..., float],
    *,
    has_holdout: bool,
    has_retain: bool,
    reference: "Reference | None" = None,
    reads_metrics: bool = True,
) -> list[TrainerCallback]:
    """Return the stopping rules that `args` asks for, in the order in which they act.

    Args:
        args: Settings of the run.
        constrainer: Its constraint.
        score: `(split, metric) -> value`; see `OverUnlearningCallback` and `RetainDropCallback`.
        has_holdout: Whether there are held-out rows.
        has_retain: Whether there is an evaluation split `retain`.
        reference: Has the reference model's loss on the content tokens of the forget rows.
        reads_metrics: Whether evaluations report the package's metrics; false with an own `compute_metrics`.

    Raises:
        SettingsError: A rule needs statistics or retain rows that the run does not have.
    """
    rules: list[TrainerCallback] = []
    target, source = args.forget_target, "forget_target"
    level, limit = None if reference is None else reference.content_loss, None
    if args.stopping_metric == "content_loss" and target is None and level is not None:
        assert reference is not None
        target, source = CONTENT_SHARE * level, f"{CONTENT_SHARE} of {reference.source}"
        limit = None if math.isnan(reference.function_loss) else reference.function_loss + FUNCTION_MARGIN
    if target is not None or (has_holdout and args.stopping_metric != "content_loss"):
        rules.append(
            OverUnlearningCallback(
                constrainer,
                args.stopping_metric,
                score,
                target,
                source,
                limit,
                relearned=args.adversary_steps > 0,
                by_row=args.row_stopping and args.stopping_metric != "content_loss",
                reads_metrics=reads_metrics,
            )
        )
    if args.max_retain_drift is not None:
        if constrainer.statistics is None:
            raise SettingsError("max_retain_drift needs statistics; pass `statistics` or `retain_dataset`")
        rules.append(DriftBudgetCallback(constrainer, args.max_retain_drift))
    if args.max_retain_drop is not None:
        if not has_retain:
            raise SettingsError(
                "max_retain_drop needs retain rows: a split `retain` in eval_dataset (--retain or --train)"
            )
        metric = "probability" if args.stopping_metric == "content_loss" else args.stopping_metric
        rules.append(RetainDropCallback(constrainer, metric, score, args.max_retain_drop, reads_metrics))
    return rules
