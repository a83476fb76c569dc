"""`UnlearningConfig`: TrainingArguments plus the settings of unlearning. The fields' help texts document them."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

import torch
from transformers import TrainingArguments, get_scheduler

from hf_unlearn.constraints.base import ConstraintLike
from hf_unlearn.constraints.registry import CONSTRAINTS, build_constraint
from hf_unlearn.core.registry import suggestion
from hf_unlearn.core.settings import require_ranges, setting
from hf_unlearn.core.storage import PLACES, Storage
from hf_unlearn.core.text import one_line
from hf_unlearn.errors import SettingsError
from hf_unlearn.losses import LOSSES, UnlearningLoss, build_loss
from hf_unlearn.statistics.sketch import SKETCH_ABOVE, SKETCH_RANK, Sketching
from hf_unlearn.trainer.presets import overridden, preset

FORGET_METRICS = ("probability", "accuracy", "loss", "content_loss")

REFUSED_OPTIMIZERS = {
    "*lomo": "steps inside the backward pass, where no step hook runs",
    "*_layerwise": "steps inside the backward pass, before gradients are constrained",
    "schedule_free_*": "swaps weights between training and evaluation, outside of any step",
}

FOLLOW_A_METRIC = ("True", "reduce_lr_on_plateau", "greedy", "best")
"""Values of `load_best_model_at_end`, `lr_scheduler_type` and `save_strategy` that need `metric_for_best_model`."""
_NO_SPLIT = ("loss", "eval_loss")  # the defaults of TrainingArguments, which has one evaluation set

REFUSED_SETTINGS: dict[str, tuple[object, str]] = {
    "dataloader_drop_last": (False, "forget and evaluation rows would be left out"),
    "train_sampling_strategy": ("random", "a step has pairs of forget and retain rows, which have no one length"),
    "eval_do_concat_batches": (True, "metrics are computed from the scores of all rows together"),
    "batch_eval_metrics": (False, "metrics are computed from the scores of all rows together"),
    "auto_find_batch_size": (False, "a second start would begin from weights that have moved"),
    "label_smoothing_factor": (0.0, "the forget loss reads the labels as they are"),
    "neftune_noise_alpha": (None, "noise on the embeddings would change what the loss and the original model see"),
    "use_liger_kernel": (False, "its fused loss returns no logits, which the forget loss reads"),
    "bf16_full_eval": (False, "it rounds the trained weights for good; bf16 evaluates in bfloat16 without that"),
    "fp16_full_eval": (False, "it rounds the trained weights for good; fp16 evaluates in float16 without that"),
    "save_only_model": (False, "a run cannot be resumed from a checkpoint without its optimizer"),
    "ignore_data_skip": (False, "a resumed run would see other rows than one without interruption"),
    "dataloader_persistent_workers": (False, "workers that live on would repeat the pairs of the first epoch"),
}
"""Settings of TrainingArguments that an unlearning run cannot keep: the value that it can, and the reason."""

# At least, and below. TrainingArguments accepts any value, and a run would end in a traceback or in NaN.
RANGES = {
    "learning_rate": (0, math.inf),
    "momentum": (0, 1),
    "weight_decay": (0, math.inf),
    "per_device_train_batch_size": (1, math.inf),
    "per_device_eval_batch_size": (1, math.inf),
    "gradient_accumulation_steps": (1, math.inf),
    "num_train_epochs": (0, math.inf),
    "max_length": (1, math.inf),
    "max_retain_drift": (0, math.inf),
    "seed": (0, 2**32),
}


@dataclass
class UnlearningConfig(TrainingArguments):
    """The settings of `transformers.TrainingArguments`, some with other defaults, and those of unlearning.

    Raises:
        SettingsError: A setting has a wrong type, is out of range, or contradicts another one.

    Example:

    >>> config = UnlearningConfig("out", loss="npo", loss_settings={"beta": 0.1}, use_cpu=True)
    >>> config.build_loss().name, config.constraint
    ('npo', 'energy_ridge')
    """

    _VALID_DICT_FIELDS = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "loss_settings",
        "constraint_settings",
        "layer_constraints",
        "utility_floor",
    ]

    # The loss.
    loss: str = setting(
        "ce_u",
        f"Forget loss: {', '.join(sorted(LOSSES))}; or module:function, your own forget term (see losses.build_loss).",
    )
    loss_settings: dict | str | None = setting(
        None,
        'Settings of the loss as JSON, such as {"beta": 0.1}. gamma and alpha are the weights of the forget and the '
        "retain term.",
    )
    original_logprobs: str | None = setting(
        None,
        "Folder for the outputs of the original model that the loss reads, so that no step needs a second forward "
        "pass; written by the first run.",
    )

    reference_model: str | None = setting(
        None,
        "Folder or Hub id of a reference model for the loss to_reference: the checkpoint before it was fine-tuned on "
        "the forget rows. Without one, the model's own prediction from a short context is the target.",
    )

    # The constraint, and the length of a step.
    constraint: str = setting("energy_ridge", f"Constraint on every step: {', '.join(CONSTRAINTS)}.")
    constraint_settings: dict | str | None = setting(
        None, 'Settings of the constraint as JSON, such as {"energy": 0.95}.'
    )
    layer_constraints: dict | str | None = setting(
        None,
        'Constraint settings that differ between layers, as JSON by name pattern, such as {"*.down_proj": {"energy": '
        "0.99}}.",
    )
    relative_step: bool = setting(
        True,
        "Make the learning rate the norm of each step relative to the norm of the trained weights, independent of the "
        "scale of the loss. If false, steps are the optimizer's own.",
    )

    # Which parameters train.
    allow_exposed: list[str] = setting([], "Name patterns of parameters that may train without protection.")
    freeze: list[str] = setting([], "Name patterns of parameters to freeze, besides biases, norms and embeddings.")
    train_only: list[str] = setting(
        [], "Name patterns of the parameters that may train, such as *.layers.5.mlp.down_proj.weight; default: all."
    )

    # When to stop.
    forget_metric: str | None = setting(
        None,
        "Metric that early stopping compares between forget and held-out rows: probability, accuracy or loss; or "
        "content_loss, the loss of the tokens that carry what is to be forgotten, compared with that of the reference "
        "model. Default: content_loss for a loss with a reference model, else probability.",
    )
    forget_target: float | None = setting(
        None,
        "Stop when the forget metric has reached this value; default: its value on held-out rows before unlearning, or "
        "0.7 of the reference model's content_loss.",
    )
    row_stopping: bool = setting(
        True,
        "Leave single forget rows alone when they have reached the target; if false, all rows are trained on until the "
        "mean has reached it.",
    )
    max_retain_drift: float | None = setting(
        None, "Stop when the predicted retain drift (root mean square over layers, relative) exceeds this."
    )
    max_retain_drop: float | None = setting(
        None,
        "Stop before the forget metric of the `retain` split has become worse by more than this; PGU's rule for entire "
        "classes is 0.05 of accuracy.",
    )

    # Training against an attacker.
    adversary_steps: int = setting(
        0,
        "Unlearn against an attacker: relearn a third of the rows for so many steps, and take each gradient, and "
        "measure the forget metric, after them on the other rows. 0: no attacker.",
    )
    adversary_learning_rate: float = setting(4e-5, "How far each step of the attacker moves every weight.")

    # Which checkpoint is the best.
    utility_floor: dict | str | None = setting(
        None,
        "Lowest metric values that an evaluation needs for its checkpoint to be the best, as JSON such as "
        '{"retain_probability": 0.9}; metric_for_best_model chooses among those checkpoints.',
    )

    # Data and statistics.
    max_length: int | None = setting(512, "Longest row in tokens; longer rows are truncated.")
    keep_statistics_on: str = setting(
        "device",
        f"Where statistics, decompositions and the constraint's matrices are kept between uses: {', '.join(PLACES)}. "
        "disk maps them from files in TMPDIR; shards gives each process a share of them.",
    )
    max_memory: str | None = setting(
        None,
        'Collect statistics in several passes, each with unfinished statistics of at most this size, such as "4GB".',
    )
    sketch_above: int = setting(
        SKETCH_ABOVE, "Keep a low-rank sketch instead of exact statistics for layers with more features than this."
    )
    sketch_rank: int = setting(SKETCH_RANK, "Rank of the sketches; a warning says if a sketch misses too much.")

    # Output and publishing.
    overwrite_output_dir: bool = setting(False, "Replace what is in the output folder.")
    base_model: str | None = setting(
        None, "Hub id of the base model for the card, with @REVISION, if the model is loaded from a local copy."
    )
    card_template: str | None = setting(None, "Your own template of the model card; default: the package's.")
    push_unfinished: bool = setting(
        False,
        "With push_to_hub and hub_strategy every_save, also publish half-unlearned weights; they stay reachable on the "
        "Hub.",
    )

    # Settings of TrainingArguments with other defaults: few large steps of constant length.
    optim: str = setting("sgd", "Optimizer; any of TrainingArguments except those that step outside of step().")
    momentum: float = setting(0.9, "Momentum of optim=sgd.")
    learning_rate: float = setting(2e-3, "Learning rate; with relative_step the relative norm of a step.")
    per_device_train_batch_size: int = setting(16, "Forget rows per step on each device.")
    lr_scheduler_type: str = setting("constant", "Learning rate schedule.")
    final_learning_rate: float | None = setting(
        None,
        "Change the learning rate exponentially to this value at the end of the run; replaces lr_scheduler_type.",
    )
    num_train_epochs: float = setting(
        30.0, "Largest number of passes over the forget set; early stopping usually ends a run before."
    )
    eval_strategy: str = setting("epoch", "When to evaluate, and to decide on stopping.")
    logging_steps: float = setting(1, "Number of steps between log lines.")
    save_strategy: str = setting("no", "When to write checkpoints to resume from.")
    report_to: None | str | list[str] = setting("none", "Trackers to report to.")
    hub_strategy: str = setting("end", "What push_to_hub publishes: end (the finished model) or every_save.")

    def __post_init__(self) -> None:
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if processes > 1 and not torch.accelerator.is_available():
            self.use_cpu = True  # otherwise TrainingArguments lets each process run on its own
        try:
            super().__post_init__()
        except ValueError as error:
            raise SettingsError(one_line(error)) from error
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
        self._check_refused()
        _check_trackers(self.report_to)
        self._check_optimizer()
        self._check_scheduler()
        self._check_best_metric()
        self._check_learning_rates()
        self._check_forget_metric()
        self._check_adversary()
        self._check_utility_floor()
        self._check_hub_strategy()
        self._check_card_template()

    @classmethod
    def from_preset(cls, name: str, output_dir: str | None = None, **settings: Any) -> "UnlearningConfig":
        """Return the settings of a preset (`presets.PRESETS`); `settings` take precedence.

        Raises:
            SettingsError: The preset does not exist, or a setting has a wrong value.

        Example:

        >>> UnlearningConfig.from_preset("paper", "out", momentum=0.5, use_cpu=True).loss
        'pgu'
        """
        return cls(**({"output_dir": output_dir} | overridden(preset(name), settings)))

    def but(self, **changes: Any) -> "UnlearningConfig":
        """Return a copy with some settings changed."""
        return replace(self, **changes)

    def build_loss(self) -> UnlearningLoss:
        """Return the loss with its settings; raise `SettingsError` on unknown ones."""
        return build_loss(self.loss, _mapping("loss_settings", self.loss_settings))

    def build_constraint(self) -> ConstraintLike:
        """Return the constraint, by layer pattern if `layer_constraints` is set; raise `SettingsError` on errors."""
        base = _mapping("constraint_settings", self.constraint_settings)
        default = build_constraint(self.constraint, base)
        by_layer = _mapping("layer_constraints", self.layer_constraints)
        if not by_layer:
            return default
        special = {
            pattern: build_constraint(self.constraint, base | settings) for pattern, settings in by_layer.items()
        }
        return {**special, "*": default}

    def _check_refused(self) -> None:
        for name, (allowed, reason) in REFUSED_SETTINGS.items():
            value = getattr(self, name, allowed)
            if value not in (allowed, "sequential"):
                raise SettingsError(f"{name}={value!r} cannot be kept in unlearning: {reason}; leave it at {allowed!r}")

    def _check_scheduler(self) -> None:
        """Raise if `lr_scheduler_type` lacks a setting of its own in `lr_scheduler_kwargs`; a run would see it late."""
        kwargs, name = self.lr_scheduler_kwargs or {}, _value(self.lr_scheduler_type)
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        try:
            get_scheduler(name, optimizer, 1, 10, scheduler_specific_kwargs=dict(kwargs))
        except (TypeError, ValueError) as error:
            raise SettingsError(f"lr_scheduler_type {name!r} with lr_scheduler_kwargs {kwargs}: {error}") from error

    def _check_best_metric(self) -> None:
        """Raise if something follows a metric, and no metric of a split is named: evaluations have no other."""
        for name in ("load_best_model_at_end", "lr_scheduler_type", "save_strategy"):
            if _value(getattr(self, name)) in FOLLOW_A_METRIC and self.metric_for_best_model in (None, *_NO_SPLIT):
                raise SettingsError(
                    f"{name}={_value(getattr(self, name))} follows a metric, and every metric is one of a split: set "
                    "metric_for_best_model, such as forget_probability or retain_loss"
                )

    def _check_optimizer(self) -> None:
        optim = _value(self.optim)
        for pattern, reason in REFUSED_OPTIMIZERS.items():
            if fnmatchcase(optim, pattern):
                raise SettingsError(f"optim {optim!r} {reason}; choose another, such as sgd or adamw_torch")

    def _check_learning_rates(self) -> None:
        if self.final_learning_rate is not None and not (self.final_learning_rate > 0 and self.learning_rate > 0):
            raise SettingsError(
                f"final_learning_rate and learning_rate must be above 0, got {self.final_learning_rate} and "
                f"{self.learning_rate}; an exponential never reaches 0"
            )

    @property
    def stopping_metric(self) -> str:
        """The forget metric: `forget_metric`, or the one that fits the loss."""
        return self.forget_metric or ("content_loss" if self.build_loss().reference_contents else "probability")

    def _check_forget_metric(self) -> None:
        if self.forget_metric is not None and self.forget_metric not in FORGET_METRICS:
            hint = suggestion(str(self.forget_metric), list(FORGET_METRICS))
            raise SettingsError(f"unknown forget_metric {self.forget_metric!r}; {hint}")
        if self.forget_metric == "content_loss" and not self.build_loss().reference_contents:
            raise SettingsError(
                "forget_metric content_loss is compared with a reference model; choose loss to_reference"
            )

    def _check_adversary(self) -> None:
        if self.adversary_steps and self.stopping_metric == "content_loss":
            raise SettingsError(
                "adversary_steps compares probabilities, not content_loss; set forget_metric=probability"
            )
        if self.adversary_steps < 0 or not self.adversary_learning_rate > 0:
            raise SettingsError(
                "adversary_steps must not be negative and adversary_learning_rate above 0, got "
                f"{self.adversary_steps} and {self.adversary_learning_rate}"
            )

    def _check_utility_floor(self) -> None:
        floor = _mapping("utility_floor", self.utility_floor)
        if floor and not (self.load_best_model_at_end and self.metric_for_best_model):
            raise SettingsError(
                "utility_floor chooses among checkpoints; set load_best_model_at_end and metric_for_best_model too"
            )

    def _check_hub_strategy(self) -> None:
        strategy = _value(self.hub_strategy)
        if strategy not in ("end", "every_save"):
            raise SettingsError(f"hub_strategy {strategy!r} would publish optimizer states; choose end or every_save")
        if strategy != "end" and not self.push_unfinished:
            raise SettingsError(
                "hub_strategy 'every_save' publishes half-unlearned weights, which stay reachable by commit; choose "
                "end, or pass push_unfinished=True as well"
            )

    def _check_card_template(self) -> None:
        """Raise before the run, and not after it, if the template has an error."""
        if self.card_template is not None:
            from hf_unlearn.publishing.card import check_template  # loads jinja2

            check_template(self.card_template)


def _check_trackers(report_to: str | Sequence[str] | None) -> None:
    """Raise if a tracker is unknown or not installed; Trainer would see it when the model is loaded."""
    from transformers.integrations import integration_utils  # loads scipy, which help texts do without

    known = list(integration_utils.INTEGRATION_TO_CALLBACK)
    for name in [report_to] if isinstance(report_to, str) else report_to or ():
        if name in ("none", "all"):
            continue
        if name not in known:
            raise SettingsError(f"unknown tracker {name!r} (report_to); {suggestion(name, [*known, 'all', 'none'])}")
        for module in (name, name.replace("_", ""), name.removesuffix("_ml")):
            is_available = getattr(integration_utils, f"is_{module}_available", None)
            if is_available is not None and not is_available():
                raise SettingsError(f"tracker {name!r} (report_to) is not installed; install it, or choose another")


def _value(setting: Any) -> str:
    """Return an option of TrainingArguments, which turns some into enums, as text."""
    return str(setting.value if isinstance(setting, Enum) else setting)


def _mapping(name: str, value: dict | str | None) -> dict[str, Any]:
    """Return a setting that is a mapping, or an empty one; TrainingArguments has parsed JSON texts already."""
    if value is not None and not isinstance(value, dict):
        raise SettingsError(f"{name} must be JSON of the form {{...}}, got {value!r}")
    return value or {}
