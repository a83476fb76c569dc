"""Checkpoints to resume from: sealed when complete, refused if they belong to another run.

A process may be killed while a checkpoint is written. The seal, `unlearning_state.json`, is written last, by rename,
and contains the hash of every other file: a folder without a seal, or whose files differ from it, is incomplete.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import logging

from hf_unlearn.constraints.step_constrainer import StepConstrainer
from hf_unlearn.core.files import sha256_of, write_json
from hf_unlearn.core.processes import wait_for_all
from hf_unlearn.errors import SettingsError
from hf_unlearn.losses import UnlearningLoss
from hf_unlearn.losses.dual_weight import DualWeightState
from hf_unlearn.trainer.config import UnlearningConfig
from hf_unlearn.trainer.stopping import OverUnlearningCallback, SavedWeights

SEAL = "unlearning_state.json"
PREVIOUS = "previous.safetensors"  # the weights of `OverUnlearningCallback.last_short`
RULES = ("forget_metric", "forget_target", "max_retain_drift", "max_retain_drop")
"""Settings of the rules that may end a run before it has made all its steps."""
_NEWEST = (True, "True", "true", "latest")

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class ResumePoint:
    """A complete checkpoint of the same run.

    Attributes:
        folder: The checkpoint.
        stop_reason: Why the run had stopped there; None if it had not.
        made_all_steps: Whether it had stopped only because it had made all its steps.
        dual_weight: State of the loss's dual weight, if it has one.
        last_short: See `OverUnlearningCallback.last_short`; None if the checkpoint was written at that evaluation.
    """

    folder: Path
    stop_reason: str | None
    made_all_steps: bool
    dual_weight: DualWeightState | None
    last_short: SavedWeights | None


class CheckpointKeeper:
    """Seals the checkpoints of one run, and finds the one to resume from.

    Args:
        args: Settings of the run.
        loss: Its loss.
        constrainer: Its constraint and statistics.
        sharding: How its weights are sharded, as `core.sharding.sharding_of` names it.
    """

    def __init__(self, args: UnlearningConfig, loss: UnlearningLoss, constrainer: StepConstrainer, sharding: str):
        self.args, self.loss, self.constrainer, self.sharding = args, loss, constrainer, sharding

    def run_identity(self) -> dict[str, Any]:
        """Return what must be the same for a checkpoint of one run to be resumed by another."""
        args, statistics = self.args, self.constrainer.statistics
        return {
            "statistics": statistics and {"weights": statistics.weights, "data": statistics.data},
            "constraint": {"name": args.constraint, "own": args.constraint_settings, "layers": args.layer_constraints},
            "loss": {"name": self.loss.name, "own": self.loss.all_settings},
            "optimizer": {"optim": str(args.optim), "momentum": args.momentum, "relative_step": args.relative_step},
            "processes": args.world_size,
            "sharding": self.sharding,
        }

    def find(self, checkpoint: str | bool | None) -> ResumePoint | None:
        """Return the checkpoint to resume from, or None to start from the beginning.

        Args:
            checkpoint: As `find_checkpoint` takes it.

        Raises:
            SettingsError: The checkpoint is incomplete, or of a run with other statistics, settings or processes.
        """
        folder = find_checkpoint(checkpoint, self.args.output_dir)
        if folder is None:
            return None
        run = check_same_run(folder, self.run_identity())
        last_short = None
        if not run["stopped"] and "previous_step" in run:
            saved = load_file(folder / self._previous_file)
            weights = [saved[str(i)].to(self.args.device) for i in range(len(saved))]
            last_short = SavedWeights(run["previous_step"], weights)
        made_all_steps = bool(run.get("made_all_steps"))
        if run["stopped"] and not made_all_steps:
            self._check_same_rules(folder, run)
        return ResumePoint(folder, run["stopped"], made_all_steps, run.get("dual_weight"), last_short)

    def _check_same_rules(self, folder: Path, run: Mapping[str, Any]) -> None:
        """Raise `SettingsError` if a rule ended the run and a setting of the rules has changed since."""
        for name, sealed in run.get("rules", {}).items():
            if (now := getattr(self.args, name)) != sealed:
                raise SettingsError(
                    f"{folder} is of a run that had ended ({run['stopped']}) with {name} {sealed}, this one has {now}; "
                    "resume with the same, or start again without resume_from_checkpoint"
                )

    @contextmanager
    def without_rotation(self) -> Iterator[None]:
        """Keep Trainer from removing old checkpoints within the context: the new one is not sealed yet."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = limit

    def seal(
        self,
        state: TrainerState,
        stop_reason: str | None,
        stopping: OverUnlearningCallback | None,
        made_all_steps: bool = False,
    ) -> None:
        """Complete and seal the checkpoint that Trainer has written for this step, then remove old ones.

        Args:
            state: State of the trainer.
            stop_reason: Why the run stops at this step; None if it does not.
            stopping: The stopping rule of the run, if it has one.
            made_all_steps: Whether it stops only because it has made all its steps.
        """
        folder = Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        run: dict[str, Any] = self.run_identity() | {"stopped": stop_reason, "made_all_steps": made_all_steps}
        run["rules"] = {name: getattr(self.args, name) for name in RULES}
        last_short = stopping.last_short if stopping is not None else None
        if last_short is not None and last_short.step < state.global_step:
            run["previous_step"] = last_short.step
            if self.args.should_save or self.sharding != "none":
                tensors = {str(i): weight.contiguous() for i, weight in enumerate(last_short.weights)}
                save_file(tensors, folder / self._previous_file)
        wait_for_all()
        if self.args.should_save:
            if self.loss.dual is not None:
                run["dual_weight"] = self.loss.dual.state()
            seal(folder, run)
            rotate_checkpoints(
                self.args.output_dir,
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=state.best_model_checkpoint,
                use_mtime=True,
            )
        wait_for_all()

    @property
    def _previous_file(self) -> str:
        return PREVIOUS if self.sharding == "none" else f"{self.args.process_index}-{PREVIOUS}"


def seal(folder: Path, run: Mapping[str, Any]) -> None:
    """Mark `folder` as a complete checkpoint of the run that `run` identifies."""
    write_json(folder / SEAL, {"run": run, "files": _hashes(folder)})


def find_checkpoint(checkpoint: str | bool | None, output_dir: str | os.PathLike) -> Path | None:
    """Return the checkpoint to resume from: a folder by name, or for True the newest complete one, if there is one.

    Raises:
        SettingsError: The named folder is not a complete checkpoint.
    """
    if checkpoint in (None, False, "False", "false"):
        return None
    if checkpoint not in _NEWEST:
        folder = Path(str(checkpoint))
        if read_seal(folder) is None:
            raise SettingsError(
                f"{folder} is not a complete checkpoint of an unlearning run; resume_from_checkpoint=True takes the "
                f"newest complete one of {output_dir}"
            )
        return folder
    folders = [f for f in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if f.name.rpartition("-")[2].isdigit()]
    for folder in sorted(folders, key=lambda f: -int(f.name.rpartition("-")[2])):
        if read_seal(folder) is not None:
            return folder
        logger.warning(f"{folder} is incomplete and is skipped")
    logger.warning(f"no complete checkpoint in {output_dir}: the run starts from the beginning")
    return None


def read_seal(folder: Path) -> dict[str, Any] | None:
    """Return the `run` that `seal` was given, or None if the folder is incomplete or was changed."""
    try:
        content = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        return content["run"] if content["files"] == _hashes(folder) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_same_run(folder: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sealed run of a complete checkpoint; raise `SettingsError` if it differs from `identity`."""
    run = json.loads((folder / SEAL).read_text(encoding="utf-8"))["run"]
    for name, value in identity.items():
        sealed = run.get(name)
        if sealed != json.loads(json.dumps(value)):
            raise SettingsError(
                f"{folder} was written by a run with {name} {_short(sealed)}, this one has {_short(value)}; resume "
                "with the same, or start again without resume_from_checkpoint"
            )
    return run


def _hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {p.relative_to(folder).as_posix(): sha256_of(p) for p in sorted(files) if SEAL not in p.name}


def _short(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
