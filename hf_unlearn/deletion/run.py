"""The commands `run`, `collect`, `evaluate` and `audit`: from the names in a YAML file to finished folders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from hf_unlearn.constraints.registry import CONSTRAINTS, needs_fisher
from hf_unlearn.core.files import check_output
from hf_unlearn.core.processes import wait_for_all
from hf_unlearn.core.text import ShortRepr
from hf_unlearn.data.batches import PaddingCollator, default_collator, take
from hf_unlearn.data.formats import Rows
from hf_unlearn.data.splits import load_rows
from hf_unlearn.deletion.arguments import DataArguments, RunArguments
from hf_unlearn.deletion.build import build_request
from hf_unlearn.deletion.checks import ModelPlan, check_collect, check_finished, check_folders, check_loss
from hf_unlearn.deletion.fine_tuning import cache_folder
from hf_unlearn.deletion.fulfil import fulfil_request_under
from hf_unlearn.deletion.next_request import next_config, open_series
from hf_unlearn.deletion.options import metric_names
from hf_unlearn.deletion.output import DEFAULT_OUTPUT
from hf_unlearn.deletion.rows import RowEncoding, load_splits
from hf_unlearn.errors import SettingsError
from hf_unlearn.evaluation.attacks.auditing import AuditSettings, audit
from hf_unlearn.evaluation.evaluate import evaluate_unlearning
from hf_unlearn.evaluation.metrics.registry import choose_metrics
from hf_unlearn.evaluation.report import UnlearningReport
from hf_unlearn.models.loading import load_model, load_processor
from hf_unlearn.publishing.model_folder import complete_folder
from hf_unlearn.statistics.collect import collect_with_options
from hf_unlearn.statistics.options import CollectionOptions
from hf_unlearn.statistics.retain_statistics import RetainStatistics
from hf_unlearn.trainer.config import UnlearningConfig

if TYPE_CHECKING:
    from hf_unlearn.models.tasks import ProcessingClass


def run_request(args: RunArguments, config: UnlearningConfig) -> dict[str, UnlearningReport]:
    """Run one deletion request, under one constraint or several.

    Args:
        args: What to forget, and what to compare with.
        config: Hyper-parameters and output folder. Several constraints get a folder each inside it.

    Returns:
        The reports by constraint name.

    Raises:
        UnlearningError: Whatever is wrong with the request.
    """
    names = _constraint_names(args, config)
    if len(names) > 1 and config.deepspeed_plugin is not None:
        raise SettingsError("DeepSpeed allows one unlearning run per process; run the constraints one by one")
    check_output(config.output_dir or DEFAULT_OUTPUT, config.overwrite_output_dir)
    check_folders(args)
    check_loss(args, config)
    series = open_series(args, names)
    if series is not None:
        config = next_config(args, config, series)
    request = build_request(args, config, fisher=any(map(needs_fisher, names)), series=series)
    configs = {name: _config_of(name, config, several=len(names) > 1) for name in names}
    finished = fulfil_request_under(request, configs)
    return {name: result.report for name, result in finished.items()}


def _constraint_names(args: RunArguments, config: UnlearningConfig) -> list[str]:
    """Return the names of the constraints to run under; raises `SettingsError` on an unknown one."""
    if args.constraints is None:
        return [config.constraint]
    if args.constraints == "all":
        return list(CONSTRAINTS)
    names = [name.strip() for name in args.constraints.split(",")]
    for name in names:
        CONSTRAINTS.find(name, also=("all",))
    return names


def _config_of(name: str, config: UnlearningConfig, several: bool) -> UnlearningConfig:
    """Return the configuration of one constraint; each of several has a folder and a repository of its own."""
    if name != config.constraint:  # the constraint settings are those of the configured constraint
        config = config.but(constraint=name, constraint_settings=None)
    if several:
        config = config.but(output_dir=str(Path(config.output_dir or DEFAULT_OUTPUT) / name))
        if config.hub_model_id:
            config = config.but(hub_model_id=f"{config.hub_model_id}-{name}")
    return config


def collect_split(
    args: DataArguments,
    rows: str,
    options: CollectionOptions,
    output_dir: str,
    overwrite: bool,
    max_length: int | None = 512,
) -> RetainStatistics:
    """Collect the statistics of a split, and save them to `output_dir`.

    Args:
        args: Model and data set.
        rows: The split, as `name` or `name[start:stop]`.
        options: How statistics are collected.
        output_dir, overwrite: Where the statistics are saved, and whether that folder may be replaced.
        max_length: Longest row in tokens, as in `run`; longer rows are cut.

    Raises:
        UnlearningError: Something that cannot be loaded, collected or saved.
    """
    plan = check_collect(args, output_dir, overwrite)
    tokenizer = load_processor(plan.name, plan.task)
    encoding = RowEncoding(task=plan.task, max_length=max_length, plan=plan)
    data = encoding.encode(load_rows(args.dataset_name, rows, "rows"), tokenizer, "statistics")
    model = load_model(plan.name, plan.task)
    collator = default_collator(tokenizer)
    statistics = collect_with_options(model, data, options, collator=collator)
    statistics.save_pretrained(output_dir, overwrite=overwrite)
    statistics.decompose(statistics.layers)  # for its summary: here, where all processes take part
    wait_for_all()
    return statistics


@dataclass(frozen=True, repr=False)
class FinishedModel(ShortRepr):
    """A finished model, the models to compare it with, and the rows to evaluate it on."""

    model: nn.Module
    original: nn.Module | None
    retrained: nn.Module | None
    splits: Mapping[str, Rows]
    processing_class: ProcessingClass
    collator: PaddingCollator

    @classmethod
    def load(cls, args: RunArguments, plan: ModelPlan, original: str | None, max_length: int | None) -> FinishedModel:
        """Load everything by name; rows are cut to `max_length` tokens, and checked before a model is loaded."""
        tokenizer = load_processor(plan.name, plan.task)
        loaded = load_splits(args, tokenizer, RowEncoding(task=plan.task, max_length=max_length, plan=plan))
        splits = {"forget": loaded.forget, **loaded.evaluation}
        choose_metrics(metric_names(args), splits)
        retrained = args.retrained if args.retrained != "none" else None
        return cls(
            original=load_model(original, plan.task) if original else None,
            retrained=load_model(retrained, plan.task) if retrained else None,
            model=load_model(plan.name, plan.task),
            splits={name: take(rows, args.max_rows) for name, rows in splits.items()},
            processing_class=tokenizer,
            collator=default_collator(tokenizer),
        )


def evaluate_finished(
    args: RunArguments,
    original: str | None,
    batch_size: int,
    seed: int,
    max_length: int | None = 512,
    reference: str | None = None,
) -> UnlearningReport:
    """Evaluate a finished model.

    Args:
        args: Model, retrained model, rows and metrics.
        original: Name of the model before unlearning.
        batch_size: Rows in a forward pass.
        seed: Seed of the bootstrap.
        max_length: Longest row in tokens, as in `run`; longer rows are cut.
        reference: Name of the model before it was fine-tuned on the rows.

    Raises:
        UnlearningError: Something that cannot be loaded or evaluated.
    """
    plan = check_finished(args, original, reference=reference)
    finished = FinishedModel.load(args, plan, original, max_length)
    return evaluate_unlearning(
        finished.model,
        finished.splits,
        original=finished.original,
        retrained=finished.retrained,
        reference=load_model(reference, plan.task) if reference else None,
        metrics=metric_names(args),
        processing_class=finished.processing_class,
        collator=finished.collator,
        batch_size=batch_size,
        seed=seed,
        cache_dir=cache_folder(args.cache_dir),
    )


def audit_finished(
    args: RunArguments,
    original: str | None,
    attacks: str | None,
    settings: AuditSettings,
    batch_size: int,
    max_length: int | None = 512,
) -> UnlearningReport:
    """Attack a finished model.

    Args:
        args: Model, retrained model and rows.
        original: Name of the model before unlearning.
        attacks: Names of attacks, with commas; None runs all.
        settings: How hard to attack.
        batch_size: Rows in a forward pass.
        max_length: Longest row in tokens, as in `run`; longer rows are cut.

    Raises:
        UnlearningError: Something that cannot be loaded, or an unknown attack.
    """
    finished = FinishedModel.load(args, check_finished(args, original, attacks), original, max_length)
    return audit(
        finished.model,
        finished.splits,
        original=finished.original,
        retrained=finished.retrained,
        attacks=[name.strip() for name in attacks.split(",")] if attacks else None,
        settings=settings,
        processing_class=finished.processing_class,
        collator=finished.collator,
        batch_size=batch_size,
    )


def add_audit(audited: UnlearningReport, folder: Path, card_template: str | None = None) -> None:
    """Add the results of an audit to the report and the card of a finished model's folder.

    Results of the same attack on the same split and model are replaced.

    Raises:
        OutputError: The folder has no report.
    """
    report = UnlearningReport.load(folder)
    key = attrgetter("name", "split", "model")
    replaced = {key(metric) for metric in audited.metrics}
    report.metrics = [metric for metric in report.metrics if key(metric) not in replaced] + audited.metrics
    for section, results in audited.audit.items():
        report.audit[section] = {**report.audit.get(section, {}), **results}
    complete_folder(folder, report, folder.resolve().name, card_template)
