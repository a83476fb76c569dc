"""Callbacks that connect the trainer to DeepSpeed and to the dual weight of a loss, and say where a run starts."""

from collections.abc import Callable

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_unlearn.core.processes import sum_over_processes
from hf_unlearn.losses.dual_weight import DualWeight
from hf_unlearn.trainer.outcome import say, start_line
from hf_unlearn.trainer.stopping import OverUnlearningCallback


class EngineCallback(TrainerCallback):
    """Call `attach` as soon as DeepSpeed's engine exists, before any other callback reads or writes weights."""

    def __init__(self, attach: Callable[[], None]):
        self.attach = attach

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self.attach()


class DualWeightCallback(TrainerCallback):
    """Update the dual weight of a loss with the retain loss of each step, summed over all processes."""

    def __init__(self, dual: DualWeight):
        self.dual = dual

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        retain = {"loss": self.dual.take()}
        sum_over_processes(retain)
        self.dual.end_step(retain["loss"].item(), state.epoch or 0.0)


class StartLineCallback(TrainerCallback):
    """Measure the forget rows at the start of a run, and say what its mark is; add it after the rules.

    Args:
        stopping: The rule that has the mark; None for a run without a mark.
    """

    def __init__(self, stopping: OverUnlearningCallback | None):
        self.stopping = stopping

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self.stopping is not None:
            self.stopping.measure_before()
        say(start_line(self.stopping))
