"""From the names in a run's settings to a `DeletionRequest`: rows, models, statistics."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch import nn

from hf_unlearn.core.processes import wait_for_all
from hf_unlearn.data.batches import default_collator, take
from hf_unlearn.data.formats import Row, Rows
from hf_unlearn.data.left_out import cut_records
from hf_unlearn.data.rehearsal import split_held_out
from hf_unlearn.data.row_identity import labelled_row_hash
from hf_unlearn.deletion.arguments import RunArguments
from hf_unlearn.deletion.checks import ModelPlan, check_run, fine_tuning_settings
from hf_unlearn.deletion.fine_tuning import cache_folder, fine_tuned
from hf_unlearn.deletion.next_request import begin_request, last_model
from hf_unlearn.deletion.options import adapter_options, card_facts, metric_names
from hf_unlearn.deletion.request import DeletionRequest, EvaluationOptions, RequestModels, RequestRows
from hf_unlearn.deletion.rows import EncodedSplits, RowEncoding, load_splits
from hf_unlearn.deletion.samples import DEFAULT_SAMPLES, ForgetSamples
from hf_unlearn.deletion.series import BegunRequest, RequestSeries
from hf_unlearn.errors import SettingsError
from hf_unlearn.evaluation.generation import can_decode
from hf_unlearn.evaluation.metrics.registry import choose_metrics
from hf_unlearn.models.fingerprint import weights_fingerprint
from hf_unlearn.models.loading import load_model, load_processor
from hf_unlearn.models.readiness import check_saveable
from hf_unlearn.statistics.collect import collect_with_options
from hf_unlearn.statistics.options import CollectionOptions
from hf_unlearn.statistics.retain_statistics import RetainStatistics
from hf_unlearn.trainer.config import UnlearningConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from hf_unlearn.models.tasks import ProcessingClass


def build_request(
    args: RunArguments, config: UnlearningConfig, *, fisher: bool, series: RequestSeries | None = None
) -> DeletionRequest:
    """Load or make everything that a request needs: rows, original and retrained model, statistics.

    Args:
        args: Names of models, rows and statistics.
        config: Hyper-parameters; those of collecting and encoding are used.
        fisher: Collect Fishers too.
        series: The series that the request continues. Its last model and statistics are the ones to start from.

    Raises:
        UnlearningError: Something that cannot be loaded or made, or settings that contradict each other.
    """
    last = last_model(args, series)
    plan = check_run(args, config, last=last, has_statistics=series is not None and bool(series.completed))
    args = replace(args, task=plan.task)
    tokenizer = load_processor(plan.name, plan.task)
    encoding = RowEncoding(
        task=plan.task,
        max_length=config.max_length,
        idk_seed=config.seed if config.build_loss().kind.alternate_answer == "idk" else None,
        plan=plan,
    )
    begun: BegunRequest | None = None
    earlier: Mapping[str, Sequence[Row]] = {}
    if series is not None:
        begun, earlier = begin_request(args, series, tokenizer, encoding)
    splits = load_splits(args, tokenizer, encoding, earlier)
    choose_metrics(metric_names(args), {"forget": splits.forget, **splits.evaluation})  # before the models are loaded
    timings: dict[str, float] = {}
    models = _load_models(args, splits, tokenizer, plan, last, timings, progress=not config.disable_tqdm)
    statistics = _load_statistics(args, config, models, splits.train, fisher, series, timings)
    return DeletionRequest(
        models=models,
        rows=_request_rows(args, splits, earlier, rehearses=config.build_loss().rehearses),
        statistics=statistics,
        subtract_forget=args.subtract_forget,
        evaluation=EvaluationOptions(
            metrics=metric_names(args),
            cache_dir=cache_folder(args.cache_dir),
            reference_model=config.reference_model or _fine_tuned_model(args, plan, last),
            sample_answers=_samples(args, splits.forget, tokenizer),
        ),
        adapter=adapter_options(args),
        series=begun,
        card=card_facts(args),
        timings=timings,
    )


# Rows


def _fine_tuned_model(args: RunArguments, plan: ModelPlan, last: str | None) -> str | None:
    """Return the checkpoint that the run fine-tunes to make the original: it does not know the forget rows."""
    is_tuned = args.fine_tune and last is None and not plan.new_head
    return args.model_name_or_path if is_tuned else None


def _samples(args: RunArguments, forget: Sequence[Row], tokenizer: ProcessingClass) -> ForgetSamples | None:
    """Return what makes sample answers: as many as were asked for, or a few of a language model for the terminal."""
    is_default = args.samples is None
    number = (DEFAULT_SAMPLES if args.task == "language-model" else 0) if args.samples is None else args.samples
    if not number or (is_default and not can_decode(tokenizer)):
        return None
    return ForgetSamples(forget[:number], cast("PreTrainedTokenizerBase", tokenizer), private=is_default)


def _request_rows(
    args: RunArguments, splits: EncodedSplits, earlier: Mapping[str, Sequence[Row]], *, rehearses: bool
) -> RequestRows:
    evaluation: dict[str, Rows] = {name: take(rows, args.max_rows) for name, rows in splits.evaluation.items()}
    rehearsal = None
    if rehearses and "holdout" in evaluation:
        rehearsal, evaluation["holdout"] = split_held_out(evaluation["holdout"])
    return RequestRows(
        forget=splits.forget,
        evaluation=evaluation,
        rehearsal=rehearsal,
        retain=splits.evaluation.get("retain") if args.use_retain_rows else None,
        forgotten_before=[row for rows in earlier.values() for row in rows] if args.forget_again else (),
        copies=splits.copies,
        source=_source(args),
        counts=cut_records({"forget": splits.forget, "train": splits.train or None, **splits.evaluation}),
    )


def _source(args: RunArguments) -> str:
    """Return where the forget rows come from, for the report: data set and split, or the name of the request's file.

    >>> _source(RunArguments(dataset_name="locuslab/TOFU", forget="forget10"))
    'TOFU forget10'
    >>> _source(RunArguments(forget_request="requests/one.json"))
    'one.json'
    """
    words = [args.dataset_name.rstrip("/").split("/")[-1], args.forget or args.train]
    return " ".join(word for word in words if word) or Path(args.forget_request or "").name


# Models


def _load_models(
    args: RunArguments,
    splits: EncodedSplits,
    tokenizer: ProcessingClass,
    plan: ModelPlan,
    last: str | None,
    timings: dict[str, float],
    progress: bool,
) -> RequestModels:
    """Load or fine-tune the original and the retrained model; fine-tuning is timed.

    Args:
        plan: The model to load.
        last: The model of the last request of a series, which is the original of this one.
        progress: Whether fine-tunes show a bar.
    """
    if args.retrained == "auto" and "retain" not in splits.evaluation:
        raise SettingsError("retrained 'auto' has no rows to retrain on: all train rows are to be forgotten")
    collator, cache = default_collator(tokenizer), cache_folder(args.cache_dir)
    settings = fine_tuning_settings(args)

    def load(folder: str | os.PathLike | None) -> nn.Module:
        if folder is not None:
            model = load_model(str(folder), plan.task)
        else:
            name = args.model_name_or_path
            model = load_model(name, plan.task, new_head=plan.new_head, classes=plan.classes)
        check_saveable(model, tokenizer)  # before hours of work, not after them
        return model

    def tuned(rows: Sequence[Row], what: str) -> tuple[nn.Module, float]:
        return fine_tuned(load, rows, settings, collator, cache, title=what if progress else None)

    if last is not None:
        original = load(last)
    elif args.fine_tune:
        original, timings["train original"] = tuned(splits.train, "fine-tuning the original")
    else:
        original = load(None)
    retrained = None
    if args.retrained == "auto":
        retrained, timings["retrain"] = tuned(splits.evaluation["retain"], "retraining without the forget rows")
    elif args.retrained not in (None, "none"):
        retrained = load(args.retrained)
    return RequestModels(original=original, retrained=retrained, processing_class=tokenizer, collator=collator)


# Statistics


def _load_statistics(
    args: RunArguments,
    config: UnlearningConfig,
    models: RequestModels,
    train: Sequence[Row],
    fisher: bool,
    series: RequestSeries | None,
    timings: dict[str, float],
) -> RetainStatistics | None:
    """Return the statistics that the request starts from, and record the seconds under `collect`.

    They are, in this order: the named ones; those that the last request of the series left; those of the train rows,
    from the cache or collected now.
    """
    start = time.perf_counter()
    if args.statistics is not None:
        statistics: RetainStatistics | None = RetainStatistics.from_pretrained(
            args.statistics, model=models.original, keep_on=config.keep_statistics_on
        )
    elif series is not None and series.completed:
        series.check_model(models.original)
        statistics = series.statistics(models.original)
    elif train:
        return _collect_or_load(args, config, models, train, fisher, timings)
    elif config.constraint == "none" and args.constraints is None:
        timings["collect"] = 0.0
        return None
    else:
        raise SettingsError("a constraint needs statistics; pass --statistics, or --train to collect them on")
    timings["collect"] = time.perf_counter() - start
    return statistics


def _collect_or_load(
    args: RunArguments,
    config: UnlearningConfig,
    models: RequestModels,
    train: Sequence[Row],
    fisher: bool,
    timings: dict[str, float],
) -> RetainStatistics:
    """Return the statistics of the train rows, from the cache if it has them; saving them is not timed."""
    start = time.perf_counter()
    form = f"{fisher} {config.sketch_above} {config.sketch_rank}"
    digest = sha256(weights_fingerprint(models.original).encode())
    digest.update(b"".join(map(labelled_row_hash, train)) + form.encode())
    folder = cache_folder(args.cache_dir) / f"statistics-{digest.hexdigest()[:20]}"
    if folder.is_dir():
        statistics = RetainStatistics.from_pretrained(folder, model=models.original, keep_on=config.keep_statistics_on)
        timings["collect"] = time.perf_counter() - start
        return statistics
    statistics = collect_with_options(
        models.original, train, CollectionOptions.from_config(config, fisher=fisher), collator=models.collator
    )
    timings["collect"] = time.perf_counter() - start
    statistics.save_pretrained(folder)
    wait_for_all()
    return statistics
