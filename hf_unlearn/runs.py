"""`hf-unlearn run`, `collect` and `evaluate`: from names in a YAML file to finished folders."""

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from operator import attrgetter
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from hf_unlearn.attacks import AuditSettings, audit
from hf_unlearn.collect import collect_statistics
from hf_unlearn.config import UnlearningConfig, setting
from hf_unlearn.constraints import CONSTRAINTS
from hf_unlearn.data import (
    Row,
    default_collator,
    encode_dataset,
    labelled_row_key,
    require_disjoint,
    require_rows,
    row_key,
    take,
)
from hf_unlearn.errors import DataError, ModelError, SettingsError
from hf_unlearn.evaluation import evaluate_unlearning
from hf_unlearn.files import check_output
from hf_unlearn.finetune import FineTuning, cache_folder, fine_tuned
from hf_unlearn.fingerprint import weights_fingerprint
from hf_unlearn.metrics.generation import generate_answers
from hf_unlearn.predictions import IGNORED, Task
from hf_unlearn.publish import complete_folder
from hf_unlearn.report import UnlearningReport
from hf_unlearn.requests import Request
from hf_unlearn.selection import read_requests, rows_by_index, rows_requested, rows_where
from hf_unlearn.sharding import is_main, loaded_whole, wait_for_all
from hf_unlearn.statistics import RetainStatistics

MODELS: dict[Task, Any] = {
    "language-model": AutoModelForCausalLM,
    "text-classification": AutoModelForSequenceClassification,
    "image-classification": AutoModelForImageClassification,
}
_FILES = {"json": "json", "jsonl": "json", "parquet": "parquet"}
_SPEC = re.compile(r"(?P<name>[\w.-]+)(?P<slice>\[\d*:\d*\])?")


@dataclass
class DataArguments:
    """Which model and which rows."""

    model_name_or_path: str = setting("", "Folder or Hub id of a model.")
    dataset_name: str = setting("", "Folder of JSON lines or Parquet, a file a split, or Hub id of a data set.")
    max_rows: int | None = setting(None, "Use at most so many rows of each split for judging.")
    cache_dir: str | None = setting(None, "Where prepared models and statistics are kept; default HF_HOME/hf_unlearn.")
    task: Task = setting("language-model", f"What the model does: {', '.join(MODELS)}.")


@dataclass
class RunArguments(DataArguments):
    """What to forget, and what to compare with. Splits are `name` or `name[start:stop]`, several with commas."""

    train: str = setting("", "Split that the model was, or is to be, trained on; it includes the forget rows.")
    forget: str = setting("", "Split to forget.")
    forget_filter: str | None = setting(
        None,
        "Forget the rows of that split (default: of train) that fit, such as 'author == \"A\"'; also !=, <, in, "
        "contains, joined by and.",
    )
    forget_indices: str | None = setting(None, "Forget the rows of it that a file numbers: a JSON list, or one a line.")
    forget_request: str | None = setting(
        None, 'Forget the rows of it that a file of JSON lines names: whole rows, or values such as {"id": 7}.'
    )
    retain: str | None = setting(None, "Split to judge retained knowledge on; default: train without forget.")
    holdout: str | None = setting(None, "Split that was never seen; early stopping compares with it.")
    eval_splits: str | None = setting(None, "Further splits to judge on.")
    use_retain_rows: bool = setting(
        False, "Use the retain rows in the loss; off: no retain row is read while unlearning."
    )
    statistics: str | None = setting(None, "Folder or Hub id of statistics; default: collected on the train split.")
    subtract_forget: bool = setting(True, "The statistics cover the forget rows: subtract theirs.")
    fine_tune: bool = setting(False, "Fine-tune the model on the train split first: it is to be made to know the rows.")
    fine_tune_epochs: float = setting(5.0, "Epochs of that fine-tune.")
    fine_tune_learning_rate: float = setting(2e-4, "Its peak learning rate (AdamW, linear decay).")
    fine_tune_batch_size: int = setting(10, "Its batch size.")
    retrained: str | None = setting(
        None, "Model trained without the forget rows: a folder or Hub id, 'auto' to fine-tune one, or 'none'."
    )
    constraints: str | None = setting(
        None, "Run several from the same original, with commas, or 'all'; a folder each below output_dir."
    )
    metrics: str | None = setting(
        None, "Metrics to report, or suites of them (default, tofu, muse, attacks), with commas."
    )
    use_peft: bool = setting(False, "Train a LoRA adapter instead of the weights.")
    lora_r: int = setting(16, "Its rank.")
    lora_alpha: int = setting(32, "Its scale: the update is multiplied by alpha over rank.")
    lora_dropout: float = setting(0.0, "Its dropout.")
    lora_target_modules: list[str] = setting([], "Names of the modules to adapt; default: all linear ones.")
    use_rslora: bool = setting(False, "Scale by alpha over the square root of the rank.")
    merge_adapter: bool = setting(False, "Write the merged model instead of the adapter.")
    samples: int = setting(0, "Show so many answers before and after; only for rows that may be published.")
    fine_tune_seed: int = setting(0, "Seed of the fine-tunes.")


def load_rows(dataset_name: str, splits: str, what: str) -> datasets.Dataset:
    """Rows of `name[start:stop]` splits: files of a local folder, configurations of a Hub data set, or its splits.

    Raises:
        DataError: A malformed or missing split, or one without rows.
    """
    if not splits:
        raise DataError(f"no {what} split was named; pass --{what} such as --{what} 'full[0:20]'")
    parts = [_load_split(dataset_name, part.strip()) for part in splits.split(",")]
    rows = datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    require_rows(rows, what)
    return rows


def _load_split(dataset_name: str, split: str) -> datasets.Dataset:
    match = _SPEC.fullmatch(split)
    if match is None:
        raise DataError(f"split {split!r} is malformed; write name or name[start:stop]")
    part = f"train{match['slice'] or ''}"
    folder = Path(dataset_name)
    try:
        if not folder.is_dir():
            if match["name"] in datasets.get_dataset_config_names(dataset_name):
                return datasets.load_dataset(dataset_name, match["name"], split=part)
            return datasets.load_dataset(dataset_name, split=split)
        files = ((folder / f"{match['name']}.{suffix}", kind) for suffix, kind in _FILES.items())
        found = [(path, kind) for path, kind in files if path.is_file()]
        if not found:
            raise DataError(f"{folder} has no {match['name']}.json, .jsonl or .parquet")
        return datasets.load_dataset(found[0][1], data_files=str(found[0][0]), split=part)
    except DataError:
        raise
    except Exception as error:  # datasets raises many kinds
        raise DataError(f"cannot load split {split!r} of {dataset_name!r}: {str(error).splitlines()[0]}") from error


def load_model(name: str, task: Task = "language-model") -> nn.Module:
    """A model in float32 (bf16 weights lose steps of relative size 1e-3), in eval mode; a head that it lacks is drawn
    by a fixed seed.

    It is put on this process's device: collecting comes before any Trainer would do so.
    """
    try:
        with loaded_whole(), torch.random.fork_rng():
            torch.manual_seed(0)
            return MODELS[task].from_pretrained(name, dtype=torch.float32).eval().to(PartialState().device)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load model {name!r}: {str(error).splitlines()[0]}") from error


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model folder or Hub id, padding with its end token if it has no own one."""
    if not name:  # the first thing that any command loads
        raise ModelError("no model was named; pass --model_name_or_path with a folder or Hub id")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the tokenizer of {name!r}: {str(error).splitlines()[0]}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_processor(name: str, task: Task) -> Any:
    """The tokenizer of a model folder or Hub id, or its image processor where the task is one of images."""
    if task not in MODELS:
        raise SettingsError(f"unknown task {task!r}; choose from {', '.join(MODELS)}")
    if task != "image-classification":
        return load_tokenizer(name)
    try:
        return AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the image processor of {name!r}: {str(error).splitlines()[0]}") from error


def run(args: RunArguments, config: UnlearningConfig) -> dict[str, UnlearningReport]:
    """One deletion request, or the same one under several constraints; reports by constraint name."""
    names = _constraints(args, config)
    if len(names) > 1 and config.deepspeed_plugin is not None:
        raise SettingsError("under DeepSpeed a process unlearns once; run the constraints one by one")
    check_output(config.output_dir or "unlearned", config.overwrite_output_dir)
    request = prepare(args, config, fisher="kronecker" in names)
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


def prepare(args: RunArguments, config: UnlearningConfig, *, fisher: bool) -> Request:
    """Load or make everything that a request needs: rows, original and retrained model, statistics."""
    if args.samples and args.task != "language-model":
        raise SettingsError(f"samples are answers; a model of task {args.task} gives none")
    tokenizer = load_processor(args.model_name_or_path, args.task)
    collator = default_collator(tokenizer)
    idk_seed = config.seed if config.build_loss().kind.alternates == "idk" else None
    splits = _splits(args, tokenizer, config.max_length, idk_seed)
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
    if args.fine_tune:
        model, timings["train original"] = fine_tuned(load, train, settings, collator, cache)
    else:
        model = load(None)
    retrained = None
    if args.retrained == "auto":
        retrained, timings["retrain"] = fine_tuned(load, splits["retain"], settings, collator, cache)
    elif args.retrained not in (None, "none"):
        retrained = load_model(args.retrained, args.task)
    statistics, timings["collect"] = _full_statistics(args, config, model, train, collator, cache, fisher)
    forget, retain = splits["forget"], splits.get("retain")
    for name, rows in splits.items():
        splits[name] = take(rows, args.max_rows) if name != "forget" else rows
    return Request(
        model, forget, splits, statistics, args.subtract_forget, retain if args.use_retain_rows else None, retrained,
        tokenizer, collator, _peft_config(args), args.merge_adapter,
        f"{args.dataset_name.rstrip('/').split('/')[-1]} {args.forget or args.train}",
        _sampler(forget[: args.samples], tokenizer) if args.samples else None, _metrics(args), cache, timings,
    )  # fmt: skip


def collect(
    args: DataArguments, rows: str, fisher: bool, output_dir: str, overwrite: bool, max_length: int | None = 512
) -> RetainStatistics:
    """`hf-unlearn collect`: statistics of a split, saved to `output_dir`; rows are cut as `run` cuts them."""
    check_output(output_dir, overwrite)
    tokenizer = load_processor(args.model_name_or_path, args.task)
    loaded = load_rows(args.dataset_name, rows, "rows")
    model = load_model(args.model_name_or_path, args.task)
    data = encode_dataset(loaded, tokenizer, what="statistics", max_length=max_length, model=model)
    collator = default_collator(tokenizer)
    statistics = collect_statistics(model, data, collator=collator, fisher=fisher, max_rows=args.max_rows)
    if is_main():
        statistics.save_pretrained(output_dir, overwrite=overwrite)
    wait_for_all()
    return statistics


def evaluate(
    args: RunArguments, original: str | None, batch_size: int, seed: int, max_length: int | None = 512
) -> UnlearningReport:
    """`hf-unlearn evaluate`: the table of a finished model; rows are cut as `run` cuts them."""
    tokenizer = load_processor(args.model_name_or_path, args.task)
    splits = _splits(args, tokenizer, max_length)
    splits.pop("train")
    return evaluate_unlearning(
        load_model(args.model_name_or_path, args.task), {n: take(rows, args.max_rows) for n, rows in splits.items()},
        original=load_model(original, args.task) if original else None,
        retrained=load_model(args.retrained, args.task) if args.retrained not in (None, "none") else None,
        metrics=_metrics(args), processing_class=tokenizer, collator=default_collator(tokenizer),
        batch_size=batch_size, seed=seed, cache_dir=cache_folder(args.cache_dir),
    )  # fmt: skip


def attack(
    args: RunArguments,
    original: str | None,
    attacks: str | None,
    settings: AuditSettings,
    batch_size: int,
    max_length: int | None = 512,
) -> UnlearningReport:
    """`hf-unlearn audit`: attacks on a finished model; rows are cut as `run` cuts them."""
    tokenizer = load_processor(args.model_name_or_path, args.task)
    splits = _splits(args, tokenizer, max_length)
    splits.pop("train")
    return audit(
        load_model(args.model_name_or_path, args.task), {n: take(rows, args.max_rows) for n, rows in splits.items()},
        original=load_model(original, args.task) if original else None,
        retrained=load_model(args.retrained, args.task) if args.retrained not in (None, "none") else None,
        attacks=[name.strip() for name in attacks.split(",")] if attacks else None, settings=settings,
        processing_class=tokenizer, collator=default_collator(tokenizer), batch_size=batch_size,
    )  # fmt: skip


def add_to_model(report: UnlearningReport, folder: Path) -> None:
    """Put an audit into the report and the card of a finished model's folder; the same numbers are replaced.

    Raises:
        OutputError: The folder has no report.
    """
    whole = UnlearningReport.load(folder)
    key = attrgetter("name", "split", "model")
    new = {key(metric) for metric in report.metrics}
    whole.metrics = [metric for metric in whole.metrics if key(metric) not in new] + report.metrics
    whole.audit = {part: whole.audit.get(part, {}) | found for part, found in report.audit.items()}
    complete_folder(folder, whole, folder.resolve().name)


def _metrics(args: RunArguments) -> list[str] | None:
    return [name.strip() for name in args.metrics.split(",")] if args.metrics else None


def _peft_config(args: RunArguments) -> Any:
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


def _constraints(args: RunArguments, config: UnlearningConfig) -> list[str]:
    if args.constraints is None:
        return [config.constraint]
    names = list(CONSTRAINTS) if args.constraints == "all" else [n.strip() for n in args.constraints.split(",")]
    for name in names:
        if name not in CONSTRAINTS:
            raise SettingsError(f"unknown constraint {name!r}; choose from {', '.join(CONSTRAINTS)}, or all")
    return names


def forget_rows(args: RunArguments) -> datasets.Dataset:
    """The raw rows to forget: a split, or those of it that a filter or a file selects; or a file's own rows.

    Raises:
        DataError: No such split, or nothing selected.
        SettingsError: Two ways to select at once.
    """
    given = {"filter": args.forget_filter, "indices": args.forget_indices, "request": args.forget_request}
    chosen = {name: value for name, value in given.items() if value is not None}
    if len(chosen) > 1:
        raise SettingsError(f"pass only one of {' and '.join('--forget_' + name for name in chosen)}")
    if args.forget_request is not None and not (args.forget or args.train):  # the file has the rows themselves
        return datasets.Dataset.from_list(read_requests(args.forget_request))
    rows = load_rows(args.dataset_name, args.forget or (args.train if chosen else ""), "forget")
    for name, value in chosen.items():
        select = {"filter": rows_where, "indices": rows_by_index, "request": rows_requested}[name]
        rows = rows.select(select(rows, value))
    return rows


def _splits(args: RunArguments, tokenizer: Any, max_length: int | None, idk_seed: int | None = None) -> dict[str, Any]:
    """Encoded rows by split; the retain split defaults to the train rows that are not to be forgotten."""
    how: dict[str, Any] = {"max_length": max_length, "task": args.task}

    def encoded(splits: str, what: str) -> Any:
        return encode_dataset(load_rows(args.dataset_name, splits, what), tokenizer, what=what, **how)

    forget = encode_dataset(forget_rows(args), tokenizer, what="forget", idk_seed=idk_seed, **how)
    train = encoded(args.train, "train") if args.train else []
    if args.retain:
        retain = encoded(args.retain, "retain")
        require_disjoint(forget, retain)
    else:
        keys = {row_key(row) for row in forget}
        retain = [row for row in train if row_key(row) not in keys]
        if train and len(retain) != len(train) - len(forget):
            missing = len(retain) + len(forget) - len(train)
            raise DataError(f"{missing} forget rows are not in the train split {args.train!r}, or are in it twice")
    found = {"train": train, "forget": forget, "retain": retain}
    if not retain:
        found.pop("retain")
    if args.holdout:
        found["holdout"] = encoded(args.holdout, "holdout")
        require_disjoint(forget, found["holdout"], "holdout")
    for split in (args.eval_splits or "").split(","):
        if split.strip():
            found[split.strip()] = encoded(split.strip(), "eval_splits")
    return found


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
        statistics = RetainStatistics.from_pretrained(args.statistics, model=model)
        return statistics, time.perf_counter() - start
    if not train:
        if config.constraint == "none" and args.constraints is None:
            return None, 0.0
        raise SettingsError("a constraint needs statistics; pass --statistics, or --train to collect them on")
    digest = sha256(
        weights_fingerprint(model).encode() + b"".join(map(labelled_row_key, train)) + bytes([fisher])
    ).hexdigest()
    folder = cache / f"statistics-{digest[:20]}"
    if folder.is_dir():
        return RetainStatistics.from_pretrained(folder, model=model), time.perf_counter() - start
    statistics = collect_statistics(
        model, train, collator=collator, fisher=fisher, batch_size=config.per_device_eval_batch_size,
        progress=not config.disable_tqdm,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    if is_main():
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
