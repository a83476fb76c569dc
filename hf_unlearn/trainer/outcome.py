"""The outcome of a run: whether the forget rows have reached the mark, and what to try next."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from hf_unlearn.core.processes import is_main
from hf_unlearn.core.text import significant

if TYPE_CHECKING:
    from hf_unlearn.trainer.stopping import OverUnlearningCallback

REACHED, MISSED, NOTHING, NO_MARK = "reached", "missed", "nothing to forget", "no mark"
FAR = 10
"""From this ratio between the metric and the mark on, the summary gives the ratio."""


@dataclass(frozen=True)
class UnlearningOutcome:
    """What a run has achieved, measured on the weights that it delivers.

    The mark is the value of the forget metric at which forget rows count as forgotten: `forget_target`, or the value on
    held-out rows under the original model.

    >>> print(UnlearningOutcome("missed", "probability", 0.02, 0.9, 0.5, 0.48, "missed by 0.48", "more epochs"))
    missed by 0.48. Next: more epochs

    Attributes:
        status: `reached`, `missed`, `nothing to forget` (the mark was reached before the first step, and no step was
            made) or `no mark` (neither held-out rows nor a `forget_target`).
        metric: The forget metric, such as `probability` or `relearned_probability`; None without a mark.
        mark: Its value to reach; None without a mark.
        before: Its value on the forget rows under the original model.
        value: Its value on the forget rows at the end; NaN if the model's outputs are not numbers.
        missed_by: Distance between `value` and `mark` if it was missed, else None.
        summary: All of this in one line.
        advice: What to try next.
    """

    status: str
    metric: str | None
    mark: float | None
    before: float | None
    value: float | None
    missed_by: float | None
    summary: str
    advice: str

    def __str__(self) -> str:
        return f"{self.summary}. Next: {self.advice}"


def start_line(stopping: "OverUnlearningCallback | None") -> str:
    """Return what a run says at its start: the mark, and where the forget rows are."""
    if stopping is None:
        return f"{NO_MARK}: {_NO_MARK_ADVICE}"
    assert stopping.mark is not None and stopping.before is not None
    direction = "rise" if stopping.rises else "fall"
    before = significant(stopping.before)
    now = f"it is {before} already: {NOTHING}, no step is made" if stopping.nothing_to_forget else f"it is {before} now"
    mark = f"{significant(stopping.mark)} ({stopping.source_of_mark})"
    return f"mark: forget {stopping.watched} has to {direction} to {mark}; {now}"


def outcome_of(
    stopping: "OverUnlearningCallback | None",
    value: float | None,
    *,
    steps: int,
    moved: bool,
    budgets: Sequence[str],
    function_loss: float | None = None,
) -> UnlearningOutcome:
    """Return the outcome of a finished run.

    Args:
        stopping: The rule with the mark, after the run; None for a run without a mark.
        value: The forget metric under the delivered weights; None without a mark.
        steps: Number of steps made.
        moved: Whether any trained weight differs from the original one.
        function_loss: Loss on function tokens, if the rule limits it.
        budgets: Settings of the rules that ended the run to spare the retain rows, such as `max_retain_drift`.
    """
    if stopping is None:
        return UnlearningOutcome(NO_MARK, None, None, None, None, None, _NO_MARK_SUMMARY, _NO_MARK_ADVICE)
    mark, before, metric = stopping.mark, stopping.before, stopping.watched
    assert mark is not None and before is not None and value is not None
    target = f"mark {significant(mark)} ({stopping.source_of_mark})"
    if stopping.nothing_to_forget:
        side = "at or above" if stopping.rises else "at or below"
        summary = f"{NOTHING}: forget {metric} {significant(before)} was {side} the {target} before the first step"
        return UnlearningOutcome(NOTHING, metric, mark, before, value, None, summary, _nothing_advice(stopping))
    seen = f"forget {metric} {significant(value)} (before: {significant(before)}), {target}"
    if stopping.function_limit is not None and function_loss is not None:
        limit = stopping.function_limit
        seen += f", function words {significant(function_loss)} nats (at most {significant(limit)})"
        if stopping.has_reached(value) and function_loss > limit:
            over = function_loss - limit
            summary = f"{MISSED} by {significant(over)} nats on function words: {seen}"
            return UnlearningOutcome(MISSED, metric, mark, before, value, over, summary, _FUNCTION_ADVICE)
    if stopping.has_reached(value):
        return UnlearningOutcome(REACHED, metric, mark, before, value, None, f"{REACHED}: {seen}", _reached_advice())
    missed_by = abs(value - mark)
    ratio = value / mark if mark > 0 else math.nan
    times = f", {significant(ratio)} times the mark" if ratio >= FAR else ""
    summary = f"{MISSED} by {significant(missed_by)}{times}: {seen}"
    advice = _missed_advice(value, steps, moved, budgets)
    return UnlearningOutcome(MISSED, metric, mark, before, value, missed_by, summary, advice)


_NO_MARK_SUMMARY = f"{NO_MARK}: the run had neither held-out rows nor forget_target to compare the forget rows with"
_NO_MARK_ADVICE = (
    "pass held-out rows (holdout_dataset, --holdout) or forget_target, so that the run can say when the rows are "
    "forgotten"
)


_FUNCTION_ADVICE = (
    "raise num_train_epochs with a low final_learning_rate, or alpha of the loss: the facts are forgotten, but words "
    "that carry nothing are broken"
)


def _reached_advice() -> str:
    return "attack the model (hf-unlearn audit): a mark that was reached does not prove that the rows cannot come back"


def _nothing_advice(stopping: "OverUnlearningCallback") -> str:
    advice = "check that the model was trained on these rows, in this format (prompt, chat template, task)"
    if stopping.target is not None:
        return f"{advice}, or choose a forget_target that they have not reached"
    return f"{advice}, and that it never saw the held-out rows; or set forget_target"


def _missed_advice(value: float, steps: int, moved: bool, budgets: Sequence[str]) -> str:
    if not math.isfinite(value):
        return "lower learning_rate: the model's outputs are not finite"
    if budgets:
        return f"raise {' or '.join(budgets)}, which ended the run, or choose a constraint that protects more"
    if steps == 0:
        return "raise num_train_epochs or max_steps: no step was made"
    if not moved:
        return (
            "no weight has changed: raise learning_rate, train more weights (train_only, freeze), or lower the energy "
            "of the constraint"
        )
    return (
        f"raise num_train_epochs or learning_rate ({steps} steps were made), or lower the energy of the constraint; "
        "row_stopping false also pushes rows that have reached the mark"
    )


def say(line: str) -> None:
    """Print a line to standard error on the main process, above any progress bar."""
    if is_main():
        tqdm.write(line, file=sys.stderr)
