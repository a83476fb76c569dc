"""The checks of a command: all that names, configurations and settings say, before a model is loaded.

`run`, `collect`, `evaluate`, `audit` and `benchmark` call these first. Rows are checked next, where they are encoded
(`rows.load_splits`) for the layout of the model without its weights; only then models are loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from hf_unlearn.core.files import check_folder, check_output
from hf_unlearn.core.processes import world
from hf_unlearn.data.formats import LABELS, TAGS
from hf_unlearn.data.splits import load_rows
from hf_unlearn.deletion.arguments import DataArguments, RunArguments
from hf_unlearn.deletion.fine_tuning import FineTuning
from hf_unlearn.deletion.options import adapter_options, metric_names
from hf_unlearn.errors import DataError, ModelError, SettingsError
from hf_unlearn.evaluation.attacks.registry import ATTACKS
from hf_unlearn.evaluation.metrics.registry import METRICS, SUITES, missing_splits
from hf_unlearn.models.adapters import check_target_modules, with_adapter
from hf_unlearn.models.loading import (
    adapter_settings,
    choose_task,
    makes_new_head,
    outline,
    read_config,
    trained_task,
)
from hf_unlearn.models.tasks import IGNORED, Task
from hf_unlearn.trainer.config import UnlearningConfig

if TYPE_CHECKING:
    import datasets
    from peft import PeftConfig
    from transformers import PreTrainedModel

_CLASSIFIERS = ("text-classification", "token-classification", "image-classification")


@dataclass(frozen=True)
class ModelPlan:
    """The model that a command will load.

    Attributes:
        name: Folder or Hub id.
        task: Its task.
        new_head: Whether it gets a new head, which is fine-tuned.
        classes: Names of the classes of a new head; None for the head that it has.
    """

    name: str
    task: Task
    new_head: bool = False
    classes: Sequence[str] | None = None

    def outline(self) -> PreTrainedModel:
        """Return the model without weights."""
        return outline(self.name, self.task, new_head=self.new_head, classes=self.classes)


# One for each command


def check_run(
    args: RunArguments, config: UnlearningConfig, *, last: str | None = None, has_statistics: bool = False
) -> ModelPlan:
    """Check a run before anything is loaded, and return the model that it starts from.

    Args:
        args: Names of models, rows and statistics.
        config: Hyper-parameters.
        last: The model of the last request of a series, which this one starts from.
        has_statistics: Whether the series left statistics.

    Raises:
        UnlearningError: The first thing that is wrong.
    """
    _check_names(args)
    check_folders(args)
    if config.original_logprobs is not None:
        check_folder(config.original_logprobs, "--original_logprobs", "the original outputs")
    has_retain = bool(args.retain or args.train)
    if args.fine_tune and not args.train:
        raise SettingsError("fine_tune needs rows to train on; pass --train")
    if args.retrained == "auto" and not has_retain:
        raise SettingsError("retrained 'auto' needs rows to retrain on; pass --train or --retain")
    if args.num_labels is not None and not (args.fine_tune and args.num_labels > 0):
        raise SettingsError("num_labels is the number of classes of a new head, above 0; pass it with --fine_tune True")
    is_constrained = config.constraint != "none" or args.constraints is not None
    if is_constrained and not (args.statistics or args.train or has_statistics):
        raise SettingsError("a constraint needs statistics; pass --statistics, or --train to collect them on")
    if config.max_retain_drop is not None and not has_retain:
        raise SettingsError("max_retain_drop needs retain rows; pass --retain or --train")
    if args.fine_tune or args.retrained == "auto":
        _check_fine_tuning(args)
    task = choose_task(last or args.model_name_or_path, args.task, new_head=args.fine_tune and last is None)
    if args.samples and task != "language-model":
        raise SettingsError(f"samples are answers of language models; a model of task {task} gives none")
    if args.retrained not in (None, "none", "auto"):
        _check_same_task(str(args.retrained), task, "retrained")
    if config.reference_model is not None:
        _check_same_task(config.reference_model, task, "reference_model")
    adapter = adapter_options(replace(args, task=task))
    plan = model_plan(args, task, last)
    if adapter is not None:
        _check_adapter(plan, adapter.peft_config)
    return plan


def check_loss(args: RunArguments, config: UnlearningConfig) -> None:
    """Raise `SettingsError` if the loss reads retain rows and the run gives it none."""
    loss = config.build_loss()
    if loss.kind.needs_retain and not (args.use_retain_rows and (args.retain or args.train)):
        raise SettingsError(
            f"loss {loss.name!r} needs retain rows; pass --use_retain_rows True and --train or --retain, or choose "
            "another loss"
        )


def check_collect(args: DataArguments, output_dir: str, overwrite: bool) -> ModelPlan:
    """Check a collection before anything is loaded, and return the model."""
    check_output(output_dir, overwrite)
    return ModelPlan(args.model_name_or_path, choose_task(args.model_name_or_path, args.task))


def check_finished(
    args: RunArguments, original: str | None, attacks: str | None = None, reference: str | None = None
) -> ModelPlan:
    """Check an evaluation or an audit of a finished model before anything is loaded, and return the model.

    Raises:
        UnlearningError: The first thing that is wrong.
    """
    if args.retrained == "auto":
        raise SettingsError(
            "retrained 'auto' fine-tunes a model, which only run and benchmark do; pass --retrained with the folder or "
            "Hub id of the retrained model, or none"
        )
    _check_metrics(args)
    check_attacks(attacks)
    check_folders(args)
    task = choose_task(args.model_name_or_path, args.task)
    for name, what in ((original, "original"), (args.retrained, "retrained"), (reference, "reference")):
        if name not in (None, "none"):
            _check_same_task(str(name), task, what)
    return ModelPlan(args.model_name_or_path, task)


def model_plan(args: RunArguments, task: Task, last: str | None = None) -> ModelPlan:
    """Return the model that a run of this task starts from; the classes of a new head are those of the rows."""
    if last is not None or not args.fine_tune:
        return ModelPlan(last or args.model_name_or_path, task)
    new_head = makes_new_head(read_config(args.model_name_or_path), task)
    if args.num_labels is not None and not (new_head and task in _CLASSIFIERS):
        raise SettingsError(
            f"{args.model_name_or_path!r} has a head for {task} already, with its own classes; leave out --num_labels"
        )
    classes = class_names(args, task) if new_head and task in _CLASSIFIERS else None
    return ModelPlan(args.model_name_or_path, task, new_head, classes)


# Names


def _check_names(args: RunArguments) -> None:
    """Check the names of metrics and attacks."""
    _check_metrics(args)
    check_attacks(getattr(args, "attacks", None))


def _check_metrics(args: RunArguments) -> None:
    """Raise an error if a metric is unknown, or needs a split that is not named."""
    for name in metric_names(args) or ():
        if name not in SUITES:
            METRICS.find(name, also=tuple(SUITES))
        for metric in SUITES.get(name, (name,)):
            if missing := missing_splits(METRICS[metric], split_names(args)):
                raise DataError(
                    f"metric {metric!r} needs a split {', '.join(missing)}; the splits are "
                    f"{', '.join(split_names(args))}: pass it with --retain, --holdout or --eval_splits"
                )


def split_names(args: RunArguments) -> dict[str, str]:
    """Return the splits of a run by their names in the report."""
    splits = {"forget": args.forget} | ({"retain": args.retain or args.train} if args.retain or args.train else {})
    splits |= {"holdout": args.holdout} if args.holdout else {}
    return splits | eval_splits(args)


def eval_splits(args: RunArguments) -> dict[str, str]:
    """Return the further splits to evaluate on, by their names in the report.

    >>> eval_splits(RunArguments(eval_splits="world_facts, quiz=exam[0:5]"))
    {'world_facts': 'world_facts', 'quiz': 'exam[0:5]'}
    """
    named = [split.strip().rpartition("=") for split in (args.eval_splits or "").split(",") if split.strip()]
    return {name.strip() or rows.strip(): rows.strip() for name, _, rows in named}


def check_attacks(attacks: str | None) -> None:
    """Raise `SettingsError` if an attack is unknown."""
    for name in (attacks or "").split(","):
        if name.strip() not in ("", "none"):
            ATTACKS.find(name.strip())


# Folders and models


def check_folders(args: RunArguments) -> None:
    """Raise `OutputError` if the cache or the ledger has the name of something that is not a folder."""
    if args.cache_dir is not None:
        check_folder(args.cache_dir, "--cache_dir", "the cache")
    if args.ledger is not None:
        check_folder(args.ledger, "--ledger", "the ledger")


def _check_same_task(name: str, task: Task, what: str) -> None:
    found = trained_task(read_config(name))
    if found != task:
        raise SettingsError(
            f"the {what} model {name!r} is {'of no known task' if found is None else f'a model of task {found}'}, and "
            f"the model to compare it with is one of task {task}; pass another --{what}"
        )


def _check_fine_tuning(args: RunArguments) -> None:
    fine_tuning_settings(args)
    _, processes = world()
    if args.fine_tune_batch_size % processes:
        raise SettingsError(
            f"the fine-tune's batch size {args.fine_tune_batch_size} is not a multiple of {processes} processes; pass "
            "another (--fine_tune_batch_size)"
        )


def fine_tuning_settings(args: RunArguments) -> FineTuning:
    """Return the settings of the fine-tunes of a run."""
    return FineTuning(
        args.fine_tune_epochs, args.fine_tune_learning_rate, args.fine_tune_batch_size, seed=args.fine_tune_seed
    )


def _check_adapter(plan: ModelPlan, config: PeftConfig) -> None:
    """Raise an error if the model has an adapter already, or if PEFT cannot add this one to the model's layers."""
    saved = adapter_settings(plan.name)
    if saved is not None:
        raise ModelError(
            f"{plan.name!r} has an adapter already ({saved.get('peft_type', 'of unknown type')}); merge it into its "
            "base model (merge_and_unload), or leave out --use_peft"
        )
    model, targets = plan.outline(), getattr(config, "target_modules", None)
    if targets is not None and not isinstance(targets, str):
        check_target_modules(model, targets)
    with torch.device("meta"):
        with_adapter(model, config)


# Rows


def check_classes(rows: datasets.Dataset, what: str, plan: ModelPlan) -> None:
    """Raise `DataError` if a row has a label that is not a class of the model; reads the column of labels alone."""
    if plan.task not in _CLASSIFIERS:
        return
    column = label_column(rows, plan.task)
    if column is None:
        return
    count = len(plan.classes) if plan.classes is not None else read_config(plan.name).num_labels
    for index, value in enumerate(rows[column]):
        for label in value if isinstance(value, list) else [value]:
            if isinstance(label, int) and label != IGNORED and not 0 <= label < count:
                way_out = "pass a larger --num_labels" if plan.new_head else "pass a model that has this class"
                raise DataError(
                    f"row {index} of the {what} set has the label {label}, and the model has classes 0 to "
                    f"{count - 1}; {way_out}, or leave the row out"
                )


def label_column(rows: datasets.Dataset, task: Task) -> str | None:
    """Return the column of raw rows that has the labels, or None."""
    names = TAGS if task == "token-classification" else LABELS
    return next((name for name in names if name in rows.column_names), None)


def class_names(args: RunArguments, task: Task) -> list[str]:
    """Return the names of the classes of a new head: those of the rows' features, or as many as the labels need.

    Raises:
        DataError: The rows have no labels that are class numbers, and `num_labels` is not given.
    """
    names: list[str] = []
    largest = -1
    splits = dict.fromkeys(split for split in (args.train, *split_names(args).values()) if split)
    for split in splits if args.num_labels is None else ():
        rows = load_rows(args.dataset_name, split, "train")
        column = label_column(rows, task)
        if column is None:
            continue
        feature = rows.features[column]
        found = list(getattr(getattr(feature, "feature", feature), "names", None) or [])
        names = found if len(found) > len(names) else names
        values = (label for value in rows[column] for label in (value if isinstance(value, list) else [value]))
        largest = max([largest, *(label for label in values if isinstance(label, int))])
    count = args.num_labels or max(len(names), largest + 1)
    if count < 1:
        raise DataError(
            f"the rows of {args.dataset_name!r} have no class numbers to make a new head for {task} from; give them a "
            "column label, or pass --num_labels"
        )
    return [*names[:count], *(f"LABEL_{number}" for number in range(len(names), count))]
