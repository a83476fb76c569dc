"""`UnlearningConfig`: TrainingArguments plus the settings of unlearning. Help texts are made from the docstrings."""

import math
import os
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from transformers import TrainingArguments

from hf_unlearn.constraints.base import ConstraintLike
from hf_unlearn.constraints.registry import CONSTRAINTS, build_constraint
from hf_unlearn.core.settings import require_ranges, setting
from hf_unlearn.core.storage import PLACES, Storage
from hf_unlearn.errors import SettingsError
from hf_unlearn.losses import LOSSES, UnlearningLoss, build_loss
from hf_unlearn.statistics.sketch import SKETCH_ABOVE, SKETCH_RANK, Sketching
from hf_unlearn.trainer.presets import overridden, preset

REFUSED_OPTIMIZERS = {
    "*lomo": "steps inside the backward pass, where no step hook runs",
    "*_layerwise": "steps inside the backward pass, before gradients are constrained",
    "schedule_free_*": "swaps weights between training and evaluation, outside of any step",
}

# At least, and below: TrainingArguments lets all through, and a run would end in a traceback or in NaN.
RANGES = {
    "learning_rate": (0, math.inf),
    "momentum": (0, 1),
    "weight_decay": (0, math.inf),
    "per_device_train_batch_size": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "num_train_epochs": (0, math.inf),
    "max_retain_drift": (0, math.inf),
    "seed": (0, 2**32),
}


@dataclass
class UnlearningConfig(TrainingArguments):
    """Everything `transformers.TrainingArguments` has, with defaults for short constrained runs, and the following."""

    _VALID_DICT_FIELDS = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "loss_settings",
        "constraint_settings",
        "layer_constraints",
        "utility_floor",
    ]

    loss: str = setting(
        "ce_u", f"Forget loss: {', '.join(sorted(LOSSES))}; or module:function, a term of your own (losses.build_loss)."
    )
    loss_settings: dict | str | None = setting(
        None, 'Settings of the loss as JSON, such as {"beta": 0.1}; gamma and alpha weigh the forget and retain terms.'
    )
    original_logprobs: str | None = setting(
        None,
        "Folder of what the loss reads of the original model, on disk instead of by a second forward pass at each "
        "step; made at the first run.",
    )
    constraint: str = setting("energy_ridge", f"Constraint on every step: {', '.join(CONSTRAINTS)}.")
    constraint_settings: dict | str | None = setting(
        None, 'Settings of the constraint as JSON, such as {"energy": 0.95}.'
    )
    layer_constraints: dict | str | None = setting(
        None, 'Settings that differ by layer, as JSON from name patterns, such as {"*.down_proj": {"energy": 0.99}}.'
    )
    relative_step: bool = setting(
        True,
        "The learning rate is the norm of each step relative to that of the trained weights, whatever the scale of the "
        "loss. Off: the optimizer's own step.",
    )
    allow_exposed: list[str] = setting([], "Name patterns of parameters that may train without protection.")
    freeze: list[str] = setting([], "Name patterns of parameters to freeze besides biases, norms and embeddings.")
    train_only: list[str] = setting(
        [], "Name patterns of the parameters that may train, such as *.layers.5.mlp.down_proj.weight; default: all."
    )
    forget_metric: str = setting(
        "probability", "What early stopping compares between forget and held-out rows: probability, accuracy or loss."
    )
    forget_target: float | None = setting(
        None, "Stop once the forget metric has reached this; default: its value on held-out rows before unlearning."
    )
    row_stopping: bool = setting(
        True, "Leave single forget rows alone that have reached the mark; otherwise all are pushed until the mean has."
    )
    max_retain_drift: float | None = setting(
        None, "Stop once the predicted retain drift (root mean square over layers, relative) exceeds this."
    )
    max_retain_drop: float | None = setting(
        None,
        "Stop before the forget metric of the `retain` split has become worse by more than this; PGU's rule for whole "
        "classes is 0.05 of accuracy.",
    )
    adversary_steps: int = setting(
        0,
        "Forget against an attacker: take each gradient, and judge by early stopping, where so many steps of "
        "relearning on a third of the rows lead; the others count. 0: at the weights themselves.",
    )
    adversary_learning_rate: float = setting(4e-5, "How far each of those steps moves every weight.")
    utility_floor: dict | str | None = setting(
        None,
        "Lowest values that metrics of an evaluation may have for its checkpoint to be the best, as JSON such as "
        '{"retain_probability": 0.9}; the best among those is by metric_for_best_model.',
    )
    max_length: int | None = setting(512, "Longest row in tokens; longer rows are cut.")
    keep_statistics_on: str = setting(
        "device",
        f"Where statistics, decompositions and the constraint's matrices are kept between uses: {', '.join(PLACES)}. "
        "disk maps them from files in TMPDIR; shards gives each process a share of them.",
    )
    max_memory: str | None = setting(
        None, 'Collect in several passes, each with unfinished statistics of at most this size, such as "4GB".'
    )
    sketch_above: int = setting(
        SKETCH_ABOVE, "Keep a low-rank sketch instead of the exact statistics of more features than this."
    )
    sketch_rank: int = setting(SKETCH_RANK, "Rank of the sketches; what they miss is warned of where it matters.")
    overwrite_output_dir: bool = setting(False, "Replace what is in the output folder.")

    base_model: str | None = setting(
        None, "Hub id to name as base model, with @REVISION, where the model is loaded from a local copy."
    )
    card_template: str | None = setting(None, "Your own template of the model card; default: the package's.")
    push_unfinished: bool = setting(
        False, "With push_to_hub and hub_strategy every_save, publish half-unlearned weights too; they stay reachable."
    )

    # Defaults of TrainingArguments that do not fit unlearning: few, large-norm, unscheduled steps.
    optim: str = setting("sgd", "Optimizer; any of TrainingArguments.")
    momentum: float = setting(0.9, "Momentum of optim=sgd.")
    learning_rate: float = setting(2e-3, "Learning rate; with relative_step the relative norm of a step.")
    per_device_train_batch_size: int = setting(16, "Forget rows of a step, on each device.")
    lr_scheduler_type: str = setting("constant", "Learning rate schedule.")
    final_learning_rate: float | None = setting(
        None, "Let the learning rate fall (or rise) exponentially to this at the end; replaces lr_scheduler_type."
    )
    num_train_epochs: float = setting(30.0, "Passes over the forget set at most; early stopping ends a run before.")
    eval_strategy: str = setting("epoch", "When to evaluate, and to decide on stopping.")
    logging_steps: float = setting(1, "Log every so many steps.")
    save_strategy: str = setting("no", "When to write checkpoints to resume from.")
    report_to: None | str | list[str] = setting("none", "Trackers to report to.")
    hub_strategy: str = setting("end", "What push_to_hub publishes: end (the finished model) or every_save.")

    def __post_init__(self) -> None:
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if processes > 1 and not torch.accelerator.is_available():
            self.use_cpu = True  # else TrainingArguments would have each of the processes run by itself
        super().__post_init__()
        if processes != self.world_size:
            raise SettingsError(
                f"{processes} processes were started and {self.world_size} joined; see `accelerate env`"
            )
        self.remove_unused_columns = False  # batches are pairs of forget and retain rows
        require_ranges(self, RANGES)
        self.build_loss()
        self.build_constraint()
        Storage(self.keep_statistics_on)
        Sketching(self.sketch_above, self.sketch_rank)
        if self.adversary_steps < 0 or not self.adversary_learning_rate > 0:
            raise SettingsError(
                "adversary_steps must not be negative and adversary_learning_rate above 0, got "
                f"{self.adversary_steps} and {self.adversary_learning_rate}"
            )
        _mapping("utility_floor", self.utility_floor)
        if self.utility_floor and not (self.load_best_model_at_end and self.metric_for_best_model):
            raise SettingsError(
                "utility_floor chooses among checkpoints; set load_best_model_at_end and metric_for_best_model too"
            )
        if self.final_learning_rate is not None and not (self.final_learning_rate > 0 and self.learning_rate > 0):
            raise SettingsError(
                f"final_learning_rate and learning_rate must be above 0, got {self.final_learning_rate} and "
                f"{self.learning_rate}; an exponential never reaches 0"
            )
        if self.card_template is not None:
            from hf_unlearn.publishing.card import check_template

            check_template(self.card_template)  # now, not after the run
        self._check_hub_strategy()
        for pattern, reason in REFUSED_OPTIMIZERS.items():
            optim = str(getattr(self.optim, "value", self.optim))
            if fnmatchcase(optim, pattern):
                raise SettingsError(f"optim {optim!r} {reason}; choose another, such as sgd or adamw_torch")
        if self.forget_metric not in ("probability", "accuracy", "loss"):
            raise SettingsError(f"forget_metric must be probability, accuracy or loss, got {self.forget_metric!r}")

    def _check_hub_strategy(self) -> None:
        strategy = str(getattr(self.hub_strategy, "value", self.hub_strategy))
        if strategy not in ("end", "every_save"):
            raise SettingsError(f"hub_strategy {strategy!r} would publish optimizer states; choose end or every_save")
        if strategy != "end" and not self.push_unfinished:
            raise SettingsError(
                "hub_strategy 'every_save' publishes half-unlearned weights, which stay reachable by commit; choose "
                "end, or pass push_unfinished=True as well"
            )

    @classmethod
    def from_preset(cls, name: str, output_dir: str | None = None, **settings: Any) -> "UnlearningConfig":
        """The settings of a preset (`presets.PRESETS`), and others, which win.

        Raises:
            SettingsError: No preset of this name, or a setting with a wrong value.
        """
        return cls(**({"output_dir": output_dir} | overridden(preset(name), settings)))

    def but(self, **changes: Any) -> "UnlearningConfig":
        """A copy with some settings changed."""
        return replace(self, **changes)

    def build_loss(self) -> UnlearningLoss:
        """The loss with its settings; raises `SettingsError` on unknown ones."""
        return build_loss(self.loss, _mapping("loss_settings", self.loss_settings))

    def build_constraint(self) -> ConstraintLike:
        """The constraint, by layer pattern where `layer_constraints` says so; raises `SettingsError`."""
        base = _mapping("constraint_settings", self.constraint_settings)
        default = build_constraint(self.constraint, base)
        by_layer = _mapping("layer_constraints", self.layer_constraints)
        if not by_layer:
            return default
        special = {p: build_constraint(self.constraint, base | s) for p, s in by_layer.items()}
        return {**special, "*": default}


def _mapping(name: str, value: dict | str | None) -> dict[str, Any]:
    """A setting given as mapping or not at all; JSON texts were parsed by TrainingArguments."""
    if value is not None and not isinstance(value, dict):
        raise SettingsError(f"{name} must be JSON of the form {{...}}, got {value!r}")
    return value or {}
