"""Everything that a request needs: rows, models, statistics."""

import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import nn

from hf_unlearn.core.processes import wait_for_all
from hf_unlearn.data.batches import default_collator, take
from hf_unlearn.data.formats import Row
from hf_unlearn.data.row_identity import labelled_row_key
from hf_unlearn.deletion.arguments import RunArguments
from hf_unlearn.deletion.fine_tuning import FineTuning, cache_folder, fine_tuned
from hf_unlearn.deletion.next_request import begin, last_model
from hf_unlearn.deletion.request import Request
from hf_unlearn.deletion.rows import load_splits
from hf_unlearn.deletion.series import RequestSeries
from hf_unlearn.errors import SettingsError
from hf_unlearn.evaluation.metrics.generation import generate_answers
from hf_unlearn.models.fingerprint import weights_fingerprint
from hf_unlearn.models.loading import load_model, load_processor
from hf_unlearn.models.tasks import IGNORED
from hf_unlearn.statistics.collect import collect_with_options
from hf_unlearn.statistics.options import CollectionOptions
from hf_unlearn.statistics.retain_statistics import RetainStatistics
from hf_unlearn.trainer.config import UnlearningConfig


def prepare(
    args: RunArguments, config: UnlearningConfig, *, fisher: bool, series: RequestSeries | None = None
) -> Request:
    """Load or make everything that a request needs: rows, original and retrained model, statistics."""
    if args.samples and args.task != "language-model":
        raise SettingsError(f"samples are answers; a model of task {args.task} gives none")
    last = last_model(args, series)
    tokenizer = load_processor(last or args.model_name_or_path, args.task)
    collator = default_collator(tokenizer)
    idk_seed = config.seed if config.build_loss().kind.alternates == "idk" else None
    how: dict[str, Any] = {"max_length": config.max_length, "task": args.task}
    earlier = begin(args, series, tokenizer, idk_seed=idk_seed, **how) if series is not None else {}
    splits = load_splits(args, tokenizer, config.max_length, idk_seed, earlier)
    train = splits.pop("train")
    timings: dict[str, float] = {}

    def load(folder: Any) -> nn.Module:
        return load_model(str(folder) if folder is not None else args.model_name_or_path, args.task)

    cache = cache_folder(args.cache_dir)
    settings = FineTuning(
        args.fine_tune_epochs, args.fine_tune_learning_rate, args.fine_tune_batch_size, seed=args.fine_tune_seed
    )
    if args.fine_tune and not train:
        raise SettingsError("fine_tune needs rows to learn; pass --train")
    if args.retrained == "auto" and "retain" not in splits:
        raise SettingsError("retrained 'auto' needs rows to retrain on; pass --train or --retain")
    if last is not None:
        model = load_model(last, args.task)
    elif args.fine_tune:
        model, timings["train original"] = fine_tuned(load, train, settings, collator, cache)
    else:
        model = load(None)
    retrained = None
    if args.retrained == "auto":
        retrained, timings["retrain"] = fine_tuned(load, splits["retain"], settings, collator, cache)
    elif args.retrained not in (None, "none"):
        retrained = load_model(args.retrained, args.task)
    start = time.perf_counter()
    if last is not None and series is not None and args.statistics is None:
        series.check_model(model)
        statistics, timings["collect"] = series.statistics(model), time.perf_counter() - start
    else:
        statistics, timings["collect"] = _full_statistics(args, config, model, train, collator, cache, fisher)
    forget, retain = splits["forget"], splits.get("retain")
    for name, rows in splits.items():
        splits[name] = take(rows, args.max_rows) if name != "forget" else rows
    return Request(
        model, forget, splits, statistics, args.subtract_forget, retain if args.use_retain_rows else None, retrained,
        tokenizer, collator, peft_config(args), args.merge_adapter,
        f"{args.dataset_name.rstrip('/').split('/')[-1]} {args.forget or args.train}",
        _sampler(forget[: args.samples], tokenizer) if args.samples else None, _metrics(args), cache, timings, series,
        [row for rows in earlier.values() for row in rows] if args.forget_again else (),
    )  # fmt: skip


def _metrics(args: RunArguments) -> list[str] | None:
    return [name.strip() for name in args.metrics.split(",")] if args.metrics else None


def peft_config(args: RunArguments) -> Any:
    if not args.use_peft:
        return None
    from peft import LoraConfig, TaskType

    targets: Any = args.lora_target_modules or "all-linear"
    try:
        return LoraConfig(
            task_type=TaskType.CAUSAL_LM if args.task == "language-model" else None, r=args.lora_r,
            lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, target_modules=targets,
            use_rslora=args.use_rslora,
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        raise SettingsError(f"LoRA settings: {str(error).splitlines()[0]}") from error


def _full_statistics(
    args: RunArguments,
    config: UnlearningConfig,
    model: nn.Module,
    train: list[Row],
    collator: Callable,
    cache: Path,
    fisher: bool,
) -> tuple[RetainStatistics | None, float]:
    """Statistics given by name, or of the train rows from the cache, or collected now; and the seconds it took."""
    start = time.perf_counter()
    if args.statistics is not None:
        statistics = RetainStatistics.from_pretrained(args.statistics, model=model, keep_on=config.keep_statistics_on)
        return statistics, time.perf_counter() - start
    if not train:
        if config.constraint == "none" and args.constraints is None:
            return None, 0.0
        raise SettingsError("a constraint needs statistics; pass --statistics, or --train to collect them on")
    kind = f"{fisher} {config.sketch_above} {config.sketch_rank}"
    digest = sha256(
        weights_fingerprint(model).encode() + b"".join(map(labelled_row_key, train)) + kind.encode()
    ).hexdigest()
    folder = cache / f"statistics-{digest[:20]}"
    if folder.is_dir():
        statistics = RetainStatistics.from_pretrained(folder, model=model, keep_on=config.keep_statistics_on)
        return statistics, time.perf_counter() - start
    options = CollectionOptions.from_config(config, fisher=fisher)
    statistics = collect_with_options(model, train, options, collator=collator)
    seconds = time.perf_counter() - start
    statistics.save_pretrained(folder)
    wait_for_all()
    return statistics, seconds


def _sampler(rows: Sequence[Row], tokenizer: Any) -> Callable[[nn.Module], list[dict[str, str]]]:
    """Answers of a model to the prompts of `rows`, by greedy decoding."""

    def answer(model: nn.Module) -> list[dict[str, str]]:
        first = [next(i for i, label in enumerate(row["labels"]) if label != IGNORED) for row in rows]
        prompts = [row["input_ids"][:count] for row, count in zip(rows, first, strict=True)]
        questions = tokenizer.batch_decode(prompts, skip_special_tokens=True)
        answers = generate_answers(model, rows, tokenizer, max_new_tokens=40)
        return [
            {"prompt": _last_turn(question.strip()), "answer": text}
            for question, text in zip(questions, answers, strict=True)
        ]

    return answer


def _last_turn(prompt: str) -> str:
    """The question alone, without the chat template's roles."""
    lines = [line for line in prompt.splitlines() if line.strip() not in ("", "assistant", "user", "Answer:")]
    return lines[-1].removeprefix("Question: ") if lines else prompt
