"""Checkpoints to resume from: sealed when complete, refused when they belong to another run.

A process may be killed while a checkpoint is written. The seal, `unlearning_state.json`, is written last, by rename,
and has the hash of every other file: a folder without it, or whose files differ from it, is no checkpoint.
"""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, rotate_checkpoints
from transformers.utils import logging

from hf_unlearn.constraints.step_constrainer import StepConstrainer
from hf_unlearn.core.files import sha256_of, write_json
from hf_unlearn.core.processes import wait_for_all
from hf_unlearn.core.sharding import sharding_of
from hf_unlearn.errors import SettingsError
from hf_unlearn.losses import UnlearningLoss
from hf_unlearn.trainer.stopping import OverUnlearningCallback

SEAL = "unlearning_state.json"
PREVIOUS = "previous.safetensors"
_ANY = (True, "True", "true", "latest")

logger = logging.get_logger(__name__)


def seal(folder: Path, run: dict[str, Any]) -> None:
    """Declare `folder` a complete checkpoint of the run that `run` describes."""
    write_json(folder / SEAL, {"run": run, "files": _hashes(folder)})


def find_checkpoint(asked: str | bool | None, output_dir: str | os.PathLike) -> Path | None:
    """The checkpoint to resume from: a folder by name, or with True the newest complete one, if there is any.

    Raises:
        SettingsError: The folder named is no complete checkpoint.
    """
    if asked in (None, False, "False", "false"):
        return None
    if asked not in _ANY:
        folder = Path(str(asked))
        if read_seal(folder) is None:
            raise SettingsError(
                f"{folder} is no complete checkpoint of an unlearning run; resume_from_checkpoint=True takes the "
                f"newest complete one of {output_dir}"
            )
        return folder
    found = [f for f in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if f.name.rpartition("-")[2].isdigit()]
    for folder in sorted(found, key=lambda f: -int(f.name.rpartition("-")[2])):
        if read_seal(folder) is not None:
            return folder
        logger.warning(f"{folder} is incomplete and is left aside")
    logger.warning(f"there is no complete checkpoint in {output_dir}: the run starts from the beginning")
    return None


def read_seal(folder: Path) -> dict[str, Any] | None:
    """What `seal` was given, or None where the folder is incomplete or altered."""
    try:
        content = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        return content["run"] if content["files"] == _hashes(folder) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_same_run(folder: Path, now: dict[str, Any]) -> dict[str, Any]:
    """The sealed description of a complete checkpoint's run; raises `SettingsError` where it differs from `now`."""
    then = json.loads((folder / SEAL).read_text(encoding="utf-8"))["run"]
    for name, value in now.items():
        seen = then.get(name)
        if seen != json.loads(json.dumps(value)):
            raise SettingsError(
                f"{folder} was written by a run with {name} {_short(seen)}, this one has {_short(value)}; resume with "
                "the same, or start anew without resume_from_checkpoint"
            )
    return then


def _hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {p.relative_to(folder).as_posix(): sha256_of(p) for p in sorted(files) if SEAL not in p.name}


def _short(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."


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
