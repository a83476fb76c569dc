"""How `UnlearningTrainer` resumes: sealed checkpoints, with what early stopping and dual weights need."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints

from hf_unlearn.callbacks import OverUnlearningCallback
from hf_unlearn.checkpoints import PREVIOUS, check_same_run, find_checkpoint, seal
from hf_unlearn.losses import UnlearningLoss
from hf_unlearn.optimizer import StepConstrainer
from hf_unlearn.sharding import sharding_of, wait_for_all


class ResumeMixin(Trainer):
    """The side of the trainer that writes checkpoints and takes them up."""

    if TYPE_CHECKING:
        args: Any
        loss: UnlearningLoss
        constrainer: StepConstrainer
        _attach: Any

    _stopped_before: str | None = None

    @property
    def stop_reason(self) -> str:
        """Why the last run ended, in words."""
        if self._stopped_before is not None:
            return self._stopped_before
        reasons = [r for cb in self.callback_handler.callbacks if (r := getattr(cb, "reason", None))]
        return "; ".join(reasons) or f"all {self.state.max_steps} steps were made"

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> Any:
        """As in Trainer; True resumes from the newest complete checkpoint of `output_dir`, or starts if there is none.

        The trainer must be made as for the first start, on the original model. The result is the same, to the bit, as
        without the interruption.

        Raises:
            SettingsError: The checkpoint is incomplete, or of a run with other statistics, settings or processes.
        """
        stopping = self._stopping_callback()
        if stopping is not None:
            stopping.previous = None
        if self.loss.dual is not None:
            self.loss.dual.reset()
        folder = find_checkpoint(resume_from_checkpoint, self.args.output_dir)
        if folder is not None:
            then = check_same_run(folder, self._run_description())
            if then["stopped"]:
                return self._take_up_stopped(folder, then["stopped"])
            if self.loss.dual is not None:
                self.loss.dual.load_state(then["dual_weight"])
            if stopping is not None and "previous_step" in then:
                saved = load_file(folder / self._previous_file)
                weights = [saved[str(i)].to(self.args.device) for i in range(len(saved))]
                stopping.previous = (then["previous_step"], weights)
        return super().train(resume_from_checkpoint=str(folder) if folder else None, **options)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As Trainer, then seal the folder; older ones are removed only after that."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        state: dict[str, Any] = {"stopped": self.stop_reason if self.control.should_training_stop else None}
        stopping = self._stopping_callback()
        if stopping is not None and stopping.previous and stopping.previous[0] < self.state.global_step:
            state["previous_step"], weights = stopping.previous
            if self.args.should_save or self.is_sharded:
                save_file({str(i): w.contiguous() for i, w in enumerate(weights)}, folder / self._previous_file)
        wait_for_all()
        if self.args.should_save:
            if self.loss.dual is not None:
                state["dual_weight"] = self.loss.dual.state()
            seal(folder, self._run_description() | state)
            rotate_checkpoints(
                self.args.output_dir, save_total_limit=limit, best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )  # fmt: skip
        wait_for_all()

    def _take_up_stopped(self, folder: Path, reason: str) -> TrainOutput:
        """Load the checkpoint of a run that had come to its end."""
        if self.is_sharded:  # such a checkpoint is loaded into a model that is sharded already
            self._prepare_for_training(self.args.max_steps, self.get_train_dataloader(), str(folder))
        else:
            self._load_from_checkpoint(str(folder))
        if self.is_deepspeed_enabled:
            self._attach(self.model_wrapped)
        self.state = TrainerState.load_from_json(str(folder / TRAINER_STATE_NAME))
        self._stopped_before = reason
        return TrainOutput(self.state.global_step, 0.0, {})

    def _run_description(self) -> dict[str, Any]:
        """What must be the same for a checkpoint of one run to be resumed by another."""
        args, statistics = self.args, self.constrainer.statistics
        return {
            "statistics": statistics and {"weights": statistics.weights, "data": statistics.data},
            "constraint": {"name": args.constraint, "own": args.constraint_settings, "layers": args.layer_constraints},
            "loss": {"name": self.loss.name, "own": self.loss.all_settings},
            "optimizer": {"optim": str(args.optim), "momentum": args.momentum, "relative_step": args.relative_step},
            "processes": args.world_size,
            "sharding": sharding_of(self.accelerator),
        }

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of the (master) weights only."""
        return sharding_of(self.accelerator) != "none"

    @property
    def _previous_file(self) -> str:
        return f"{self.args.process_index}-{PREVIOUS}" if self.is_sharded else PREVIOUS

    def _stopping_callback(self) -> OverUnlearningCallback | None:
        callbacks = self.callback_handler.callbacks
        return next((cb for cb in callbacks if isinstance(cb, OverUnlearningCallback)), None)
