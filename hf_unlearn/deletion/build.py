"""From the names in a run's settings to a `DeletionRequest`: rows, models, statistics."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING

from torch import nn

from hf_unlearn.core.processes import wait_for_all
from hf_unlearn.data.batches import default_collator, take
from hf_unlearn.data.formats import Row
from hf_unlearn.data.row_identity import labelled_row_hash
from hf_unlearn.deletion.arguments import RunArguments
from hf_unlearn.deletion.fine_tuning import FineTuning, cache_folder, fine_tuned
from hf_unlearn.deletion.next_request import begin_request, last_model
from hf_unlearn.deletion.request import AdapterOptions, DeletionRequest, EvaluationOptions, RequestModels, RequestRows
from hf_unlearn.deletion.rows import EncodedSplits, RowEncoding, load_splits
from hf_unlearn.deletion.series import BegunRequest, RequestSeries
from hf_unlearn.errors import SettingsError
from hf_unlearn.evaluation.generation import generate_answers
from hf_unlearn.models.fingerprint import weights_fingerprint
from hf_unlearn.models.loading import load_model, load_processor
from hf_unlearn.models.readiness import check_saveable
from hf_unlearn.models.tasks import IGNORED
from hf_unlearn.statistics.collect import collect_with_options
from hf_unlearn.statistics.options import CollectionOptions
from hf_unlearn.statistics.retain_statistics import RetainStatistics
from hf_unlearn.trainer.config import UnlearningConfig

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerBase

    from hf_unlearn.models.tasks import ProcessingClass

SAMPLE_TOKENS = 40
"""Longest sample answer, in tokens."""


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
    if args.samples and args.task != "language-model":
        raise SettingsError(f"samples are answers of language models; a model of task {args.task} gives none")
    last = last_model(args, series)
    tokenizer = load_processor(last or args.model_name_or_path, args.task)
    encoding = RowEncoding(
        task=args.task,
        max_length=config.max_length,
        idk_seed=config.seed if config.build_loss().kind.alternate_answer == "idk" else None,
    )
    begun: BegunRequest | None = None
    earlier: Mapping[str, Sequence[Row]] = {}
    if series is not None:
        begun, earlier = begin_request(args, series, tokenizer, encoding)
    splits = load_splits(args, tokenizer, encoding, earlier)
    timings: dict[str, float] = {}
    models = _load_models(args, splits, tokenizer, last, timings)
    statistics = _load_statistics(args, config, models, splits.train, fisher, series, timings)
    return DeletionRequest(
        models=models,
        rows=_request_rows(args, splits, earlier),
        statistics=statistics,
        subtract_forget=args.subtract_forget,
        evaluation=EvaluationOptions(
            metrics=metric_names(args),
            cache_dir=cache_folder(args.cache_dir),
            sample_answers=_sampler(splits.forget[: args.samples], tokenizer) if args.samples else None,
        ),
        adapter=adapter_options(args),
        series=begun,
        timings=timings,
    )


# Rows


def _request_rows(args: RunArguments, splits: EncodedSplits, earlier: Mapping[str, Sequence[Row]]) -> RequestRows:
    return RequestRows(
        forget=splits.forget,
        evaluation={name: take(rows, args.max_rows) for name, rows in splits.evaluation.items()},
        retain=splits.evaluation.get("retain") if args.use_retain_rows else None,
        forgotten_before=[row for rows in earlier.values() for row in rows] if args.forget_again else (),
        source=f"{args.dataset_name.rstrip('/').split('/')[-1]} {args.forget or args.train}",
    )


# Models


def _load_models(
    args: RunArguments,
    splits: EncodedSplits,
    tokenizer: ProcessingClass,
    last: str | None,
    timings: dict[str, float],
) -> RequestModels:
    """Load or fine-tune the original and the retrained model; fine-tuning is timed.

    Args:
        last: The model of the last request of a series, which is the original of this one.
    """
    if args.fine_tune and not splits.train:
        raise SettingsError("fine_tune needs rows to train on; pass --train")
    if args.retrained == "auto" and "retain" not in splits.evaluation:
        raise SettingsError("retrained 'auto' needs rows to retrain on; pass --train or --retain")
    collator, cache = default_collator(tokenizer), cache_folder(args.cache_dir)
    settings = FineTuning(
        args.fine_tune_epochs, args.fine_tune_learning_rate, args.fine_tune_batch_size, seed=args.fine_tune_seed
    )

    def load(folder: str | os.PathLike | None) -> nn.Module:
        model = load_model(args.model_name_or_path if folder is None else str(folder), args.task)
        check_saveable(model, tokenizer)  # before hours of work, not after them
        return model

    if last is not None:
        original = load(last)
    elif args.fine_tune:
        original, timings["train original"] = fine_tuned(load, splits.train, settings, collator, cache)
    else:
        original = load(None)
    retrained = None
    if args.retrained == "auto":
        retrained, timings["retrain"] = fine_tuned(load, splits.evaluation["retain"], settings, collator, cache)
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


# Options


def metric_names(args: RunArguments) -> list[str] | None:
    """Return the names of the metrics that a run asks for, or None for the default ones."""
    return [name.strip() for name in args.metrics.split(",")] if args.metrics else None


def adapter_options(args: RunArguments) -> AdapterOptions | None:
    """Return the LoRA adapter that a run asks for, or None.

    Raises:
        SettingsError: PEFT does not accept the settings.
    """
    config = peft_config(args)
    return None if config is None else AdapterOptions(peft_config=config, merge=args.merge_adapter)


def peft_config(args: RunArguments) -> LoraConfig | None:
    """Return the configuration of the LoRA adapter that a run asks for, or None; raises as `adapter_options`."""
    if not args.use_peft:
        return None
    from peft import LoraConfig, TaskType

    try:
        return LoraConfig(
            task_type=TaskType.CAUSAL_LM if args.task == "language-model" else None,
            r=args.lora_r,
            lora_alpha=args.lora_alpha,
            lora_dropout=args.lora_dropout,
            target_modules=args.lora_target_modules or "all-linear",
            use_rslora=args.use_rslora,
        )
    except (ValueError, TypeError) as error:
        raise SettingsError(f"LoRA settings: {str(error).splitlines()[0]}") from error


# Sample answers


def _sampler(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> Callable[[nn.Module], list[dict[str, str]]]:
    """Return a function that answers the prompts of `rows` with a model, by greedy decoding."""

    def answer(model: nn.Module) -> list[dict[str, str]]:
        prompt_lengths = [next(i for i, label in enumerate(row["labels"]) if label != IGNORED) for row in rows]
        prompts = [row["input_ids"][:length] for row, length in zip(rows, prompt_lengths, strict=True)]
        questions = tokenizer.batch_decode(prompts, skip_special_tokens=True)
        answers = generate_answers(model, rows, tokenizer, max_new_tokens=SAMPLE_TOKENS)
        return [
            {"prompt": _last_turn(question.strip()), "answer": text}
            for question, text in zip(questions, answers, strict=True)
        ]

    return answer


def _last_turn(prompt: str) -> str:
    """Return the question alone, without the roles of the chat template."""
    lines = [line for line in prompt.splitlines() if line.strip() not in ("", "assistant", "user", "Answer:")]
    return lines[-1].removeprefix("Question: ") if lines else prompt
