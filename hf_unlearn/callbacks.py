"""When to stop: forgotten as far as never-seen rows, or the predicted retain drift is used up."""

from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_unlearn.optimizer import StepConstrainer


class OverUnlearningCallback(TrainerCallback):
    """Stop at the first evaluation at which forget rows look like held-out ones (PGU, WACV 2024, section 3.5).

    To forget more than a model that never saw the rows is itself a leak. Of this evaluation and the one before, the
    weights with the smaller gap between the two sets are kept. With a fixed `target` the run stops once it is reached.

    Needs evaluations of `forget` and, without a target, of `holdout`.
    """

    def __init__(self, constrainer: StepConstrainer, metric: str, target: float | None = None):
        self.constrainer, self.metric, self.target = constrainer, metric, target
        self.reason: str | None = None
        self.previous: tuple[float, int, list[Tensor]] | None = None
        self._seen: dict[str, tuple[int, float]] = {}

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: dict, **kwargs: Any
    ) -> None:
        for split in ("forget", "holdout"):
            if (value := metrics.get(f"eval_{split}_{self.metric}")) is not None:
                self._seen[split] = (state.global_step, value)
        forget, holdout = self._seen.get("forget"), self._seen.get("holdout")
        if forget is None or (self.target is None and (holdout is None or holdout[0] != forget[0])):
            return
        self._seen.clear()
        reference = self.target if self.target is not None else holdout[1]  # type: ignore[index]
        self._decide(forget[1], reference, state.global_step, control)

    def _decide(self, forget: float, reference: float, step: int, control: TrainerControl) -> None:
        gap = reference - forget if self.metric == "loss" else forget - reference
        if gap > 0:
            self.previous = (gap, step, self.constrainer.weights())
            return
        control.should_training_stop = True
        what = f"forget {self.metric} {forget:.4f} reached {'the target' if self.target is not None else 'held-out'}"
        self.reason = f"{what} {reference:.4f} at step {step}"
        if self.target is None and self.previous is not None and self.previous[0] < -gap:
            self.constrainer.restore(self.previous[2])
            self.reason += f"; the weights of step {self.previous[1]} were closer and are kept"


class DriftBudgetCallback(TrainerCallback):
    """Stop before the predicted retain drift exceeds a budget; the weights of the last step within it are kept."""

    def __init__(self, constrainer: StepConstrainer, max_retain_drift: float):
        self.constrainer, self.budget = constrainer, max_retain_drift
        self.reason: str | None = None
        self._within = constrainer.weights()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        drift = self.constrainer.drift().relative
        if drift <= self.budget:
            self._within = self.constrainer.weights()
            return
        self.constrainer.restore(self._within)
        control.should_training_stop = True
        self.reason = f"step {state.global_step} would drift {drift:.4f}, above max_retain_drift {self.budget}; undone"
