"""Models, tokenizers, processors and rows by name: folders, or ids on the Hub."""

import re
from collections.abc import Mapping, Sequence
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
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from hf_unlearn.arguments import RunArguments
from hf_unlearn.data import encode_dataset, require_disjoint, require_rows, row_key
from hf_unlearn.errors import DataError, ModelError, SettingsError
from hf_unlearn.formats import Row
from hf_unlearn.predictions import Task
from hf_unlearn.selection import read_requests, rows_by_index, rows_requested, rows_where
from hf_unlearn.sharding import loaded_whole

MODELS: dict[Task, Any] = {
    "language-model": AutoModelForCausalLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "text-classification": AutoModelForSequenceClassification,
    "token-classification": AutoModelForTokenClassification,
    "image-classification": AutoModelForImageClassification,
}
_FILES = {"json": "json", "jsonl": "json", "parquet": "parquet"}
_SPEC = re.compile(r"((?P<config>[\w.-]+)/)?(?P<name>[\w.-]+)(?P<slice>\[\d*:\d*\])?")


def load_rows(dataset_name: str, splits: str, what: str) -> datasets.Dataset:
    """Rows of `name[start:stop]` splits: files of a local folder, configurations of a Hub data set, or its splits.

    `config/name` is a split of one of its configurations, or a file of a subfolder.

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
        raise DataError(f"split {split!r} is malformed; write name, name[start:stop] or config/name")
    part = f"train{match['slice'] or ''}"
    folder = Path(dataset_name)
    try:
        if not folder.is_dir():
            if match["config"]:
                return datasets.load_dataset(dataset_name, match["config"], split=split.partition("/")[2])
            if match["name"] in datasets.get_dataset_config_names(dataset_name):
                return datasets.load_dataset(dataset_name, match["name"], split=part)
            return datasets.load_dataset(dataset_name, split=split)
        folder = folder / (match["config"] or "")
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


def forget_rows(args: RunArguments) -> datasets.Dataset:
    """The raw rows to forget: a split, or those of it that a filter or a file selects; or a file's own rows.

    Raises:
        DataError: No such split, or nothing selected.
        SettingsError: Two ways to select at once.
    """
    return selected_rows(where_selected(args))


def where_selected(args: RunArguments) -> dict[str, Any]:
    """Where the rows to forget are, for `selected_rows`: data set, split and, of some of its rows, their numbers.

    Errors are those of `forget_rows`.
    """
    given = {"filter": args.forget_filter, "indices": args.forget_indices, "request": args.forget_request}
    chosen = {name: value for name, value in given.items() if value is not None}
    if len(chosen) > 1:
        raise SettingsError(f"pass only one of {' and '.join('--forget_' + name for name in chosen)}")
    if args.forget_request is not None and not (args.forget or args.train):  # the file has the rows themselves
        return {"request": str(Path(args.forget_request).resolve())}
    place = str(Path(args.dataset_name).resolve()) if Path(args.dataset_name).is_dir() else args.dataset_name
    where: dict[str, Any] = {"dataset_name": place, "forget": args.forget or (args.train if chosen else "")}
    for name, value in chosen.items():
        select = {"filter": rows_where, "indices": rows_by_index, "request": rows_requested}[name]
        where["numbers"] = select(load_rows(place, where["forget"], "forget"), value)
    return where


def selected_rows(where: Mapping[str, Any]) -> datasets.Dataset:
    """The raw rows that `where_selected` told of; raises `DataError` where they are not there any more."""
    if "request" in where:
        return datasets.Dataset.from_list(read_requests(where["request"]))
    rows = load_rows(where["dataset_name"], where["forget"], "forget")
    if any(number >= len(rows) for number in where.get("numbers", ())):
        raise DataError(f"split {where['forget']!r} has only {len(rows)} rows by now")
    return rows.select(where["numbers"]) if "numbers" in where else rows


def load_splits(
    args: RunArguments,
    tokenizer: Any,
    max_length: int | None,
    idk_seed: int | None = None,
    earlier: Mapping[str, Sequence[Row]] | None = None,
) -> dict[str, Any]:
    """Encoded rows by split; the retain split defaults to the train rows that are not to be forgotten.

    Rows that were forgotten `earlier` are in no train or retain split, and in splits of their own.
    """
    how: dict[str, Any] = {"max_length": max_length, "task": args.task}
    gone = {row_key(row) for rows in (earlier or {}).values() for row in rows}

    def left(rows: Any) -> Any:
        return [row for row in rows if row_key(row) not in gone] if gone else rows

    def encoded(splits: str, what: str) -> Any:
        return encode_dataset(load_rows(args.dataset_name, splits, what), tokenizer, what=what, **how)

    forget = encode_dataset(forget_rows(args), tokenizer, what="forget", idk_seed=idk_seed, **how)
    train = left(encoded(args.train, "train")) if args.train else []
    if args.retain:
        retain = left(encoded(args.retain, "retain"))
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
            name, _, rows = split.strip().rpartition("=")
            found[name.strip() or rows] = encoded(rows.strip(), "eval_splits")
    return found | dict(earlier or {})
