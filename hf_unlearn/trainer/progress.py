"""What a run shows while it trains: a bar, and one readable line a step in place of Trainer's dictionaries."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler
from transformers.trainer_utils import has_length

from hf_unlearn.core.text import significant
from hf_unlearn.trainer.outcome import say

_NAMES = {"retain_drift": "retain drift", "retain_kl": "retain KL", "leak": "leak", "retain_weight": "retain weight"}
_NOT_SHOWN = ("_runtime", "_per_second", "_time", "_entropy")  # ends of names


def use_step_lines(handler: CallbackHandler, splits: Sequence[str]) -> None:
    """Replace Trainer's own bar or printer by `StepLinesCallback`; a notebook's table stays."""
    for kind in (ProgressCallback, PrinterCallback):
        for callback in [c for c in handler.callbacks if type(c) is kind]:
            handler.remove_callback(callback)
            handler.add_callback(StepLinesCallback(splits, bar=kind is ProgressCallback))


class StepLinesCallback(ProgressCallback):
    """Show a bar of the steps, and write what is logged at a step as one line to standard error.

    Args:
        splits: Names of the evaluation splits.
        bar: Whether to show bars of steps and of evaluations.
    """

    def __init__(self, splits: Sequence[str] = (), bar: bool = True):
        super().__init__()
        self._splits, self._shows_bar = splits, bar
        self.prediction_bar: tqdm | None = None
        self._trains = False
        self._waiting: dict[str, float] = {}  # what was logged at the last step

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._trains, self._waiting, self.current_step = True, {}, state.global_step
        if state.is_world_process_zero and self._shows_bar:
            self.training_bar = tqdm(
                total=state.max_steps, initial=state.global_step, desc="Unlearning", unit="step", dynamic_ncols=True
            )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._write(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.training_bar is not None:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: DataLoader | None = None,
        **kwargs: Any,
    ) -> None:
        if not (self._shows_bar and state.is_world_process_zero and has_length(eval_dataloader)):
            return
        assert eval_dataloader is not None
        if self.prediction_bar is None:
            self.prediction_bar = tqdm(
                total=len(eval_dataloader), desc="Evaluating", unit="batch", leave=False, dynamic_ncols=True
            )
        self.prediction_bar.update()
        if self.prediction_bar.n >= len(eval_dataloader):  # the stopping rule measures without `on_evaluate`
            self.prediction_bar.close()
            self.prediction_bar = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self._waiting |= logs or {}
        if not self._trains:
            self._write(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._write(state)
        self._trains = False
        if self.training_bar is not None:
            self.training_bar.close()
            self.training_bar = None

    def _write(self, state: TrainerState) -> None:
        logs, self._waiting = self._waiting, {}
        text = step_line(logs, self._splits)
        if text and state.is_world_process_zero:
            say(f"step {state.global_step}/{state.max_steps}: {text}" if self._trains else text)


def step_line(logs: Mapping[str, Any], splits: Sequence[str]) -> str:
    """Return what was logged at a step in one line: the loss and the drift, then each split's metrics.

    >>> logs = {"loss": 2.51234, "retain_drift": 1.23e-5, "learning_rate": 0.01, "epoch": 1.0}
    >>> step_line(logs | {"eval_forget_probability": 0.312345, "eval_forget_runtime": 1.2}, ["forget"])
    'loss 2.51, retain drift 1.23e-05; forget probability 0.312'

    Args:
        logs: Values by the names of Trainer's log.
        splits: Names of the evaluation splits.
    """
    train = [f"{name} {significant(logs[key])}" for key, name in ({"loss": "loss"} | _NAMES).items() if key in logs]
    parts = [", ".join(train)]
    shown = {key: value for key, value in logs.items() if key.startswith("eval_") and not key.endswith(_NOT_SHOWN)}
    for split in [*splits, ""]:
        prefix = f"eval_{split}_" if split else "eval_"
        values = {key: shown.pop(key) for key in list(shown) if key.startswith(prefix)}
        words = [f"{key.removeprefix(prefix).replace('_', ' ')} {_shown(value)}" for key, value in values.items()]
        parts.append(f"{split} {', '.join(words)}".strip() if words else "")
    return "; ".join(part for part in parts if part)


def _shown(value: object) -> str:
    return significant(value) if isinstance(value, (int, float)) else str(value)
