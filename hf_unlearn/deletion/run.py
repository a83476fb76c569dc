"""`hf-unlearn run`, `collect`, `evaluate` and `audit`: from names in a YAML file to finished folders."""

from operator import attrgetter
from pathlib import Path
from typing import Any

from torch import nn

from hf_unlearn.constraints.registry import CONSTRAINTS, needs_fisher
from hf_unlearn.core.files import check_output
from hf_unlearn.core.processes import wait_for_all
from hf_unlearn.data.batches import default_collator, take
from hf_unlearn.data.encoding import encode_dataset
from hf_unlearn.data.splits import load_rows
from hf_unlearn.deletion.arguments import DataArguments, RunArguments
from hf_unlearn.deletion.fine_tuning import cache_folder
from hf_unlearn.deletion.next_request import continued, open_series
from hf_unlearn.deletion.prepare import _metrics, prepare
from hf_unlearn.deletion.rows import load_splits
from hf_unlearn.errors import SettingsError
from hf_unlearn.evaluation.attacks.audit import AuditSettings, audit
from hf_unlearn.evaluation.evaluate import evaluate_unlearning
from hf_unlearn.evaluation.report import UnlearningReport
from hf_unlearn.models.loading import load_model, load_processor
from hf_unlearn.publishing.model_folder import complete_folder
from hf_unlearn.statistics.collect import collect_with_options
from hf_unlearn.statistics.options import CollectionOptions
from hf_unlearn.statistics.retain_statistics import RetainStatistics
from hf_unlearn.trainer.config import UnlearningConfig


def run(args: RunArguments, config: UnlearningConfig) -> dict[str, UnlearningReport]:
    """One deletion request, or the same one under several constraints; reports by constraint name."""
    names = _constraints(args, config)
    if len(names) > 1 and config.deepspeed_plugin is not None:
        raise SettingsError("under DeepSpeed a process unlearns once; run the constraints one by one")
    check_output(config.output_dir or "unlearned", config.overwrite_output_dir)
    series = open_series(args, names)
    if series is not None:
        config = continued(args, config, series)
    request = prepare(args, config, fisher=any(needs_fisher(name) for name in names), series=series)
    reports = {}
    for name in names:
        own = config
        if name != config.constraint:  # its settings are another's
            own = own.but(constraint=name, constraint_settings=None)
        if len(names) > 1:
            own = own.but(output_dir=str(Path(config.output_dir or "unlearned") / name))
            if config.hub_model_id:
                own = own.but(hub_model_id=f"{config.hub_model_id}-{name}")
        reports[name] = request.fulfil(own)
    return reports


def collect(
    args: DataArguments,
    rows: str,
    options: CollectionOptions,
    output_dir: str,
    overwrite: bool,
    max_length: int | None = 512,
) -> RetainStatistics:
    """`hf-unlearn collect`: statistics of a split, saved to `output_dir`; rows are cut as `run` cuts them."""
    check_output(output_dir, overwrite)
    tokenizer = load_processor(args.model_name_or_path, args.task)
    loaded = load_rows(args.dataset_name, rows, "rows")
    model = load_model(args.model_name_or_path, args.task)
    data = encode_dataset(loaded, tokenizer, what="statistics", max_length=max_length, model=model)
    collator = default_collator(tokenizer)
    statistics = collect_with_options(model, data, options, collator=collator)
    statistics.save_pretrained(output_dir, overwrite=overwrite)
    statistics.decompose(statistics.layers)  # for its summary: here, where every process is
    wait_for_all()
    return statistics


def evaluate(
    args: RunArguments, original: str | None, batch_size: int, seed: int, max_length: int | None = 512
) -> UnlearningReport:
    """`hf-unlearn evaluate`: the table of a finished model; rows are cut as `run` cuts them."""
    model, splits, options = _finished(args, original, batch_size, max_length)
    cache = cache_folder(args.cache_dir)
    return evaluate_unlearning(model, splits, metrics=_metrics(args), seed=seed, cache_dir=cache, **options)


def attack(
    args: RunArguments,
    original: str | None,
    attacks: str | None,
    settings: AuditSettings,
    batch_size: int,
    max_length: int | None = 512,
) -> UnlearningReport:
    """`hf-unlearn audit`: attacks on a finished model; rows are cut as `run` cuts them."""
    model, splits, options = _finished(args, original, batch_size, max_length)
    chosen = [name.strip() for name in attacks.split(",")] if attacks else None
    return audit(model, splits, attacks=chosen, settings=settings, **options)


def _finished(
    args: RunArguments, original: str | None, batch_size: int, max_length: int | None
) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """A finished model, rows to judge it on, and what else `evaluate_unlearning` and `audit` both take."""
    tokenizer = load_processor(args.model_name_or_path, args.task)
    splits = {name: take(rows, args.max_rows) for name, rows in load_splits(args, tokenizer, max_length).items()}
    splits.pop("train")
    others = {"original": original, "retrained": args.retrained if args.retrained != "none" else None}
    options: dict[str, Any] = {kind: load_model(name, args.task) if name else None for kind, name in others.items()}
    options |= {"processing_class": tokenizer, "collator": default_collator(tokenizer), "batch_size": batch_size}
    return load_model(args.model_name_or_path, args.task), splits, options


def add_to_model(report: UnlearningReport, folder: Path, card_template: str | None = None) -> None:
    """Put an audit into the report and the card of a finished model's folder; the same numbers are replaced.

    Raises:
        OutputError: The folder has no report.
    """
    whole = UnlearningReport.load(folder)
    key = attrgetter("name", "split", "model")
    new = {key(metric) for metric in report.metrics}
    whole.metrics = [metric for metric in whole.metrics if key(metric) not in new] + report.metrics
    whole.audit = {part: whole.audit.get(part, {}) | found for part, found in report.audit.items()}
    complete_folder(folder, whole, folder.resolve().name, card_template)


def _constraints(args: RunArguments, config: UnlearningConfig) -> list[str]:
    if args.constraints is None:
        return [config.constraint]
    names = list(CONSTRAINTS) if args.constraints == "all" else [n.strip() for n in args.constraints.split(",")]
    for name in names:
        CONSTRAINTS.find(name, also=("all",))
    return names
