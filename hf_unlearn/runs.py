"""`hf-unlearn run`, `collect` and `evaluate` for language models: from names in a YAML file to finished folders."""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

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
)
from hf_unlearn.errors import DataError, ModelError, SettingsError
from hf_unlearn.evaluation import evaluate_unlearning
from hf_unlearn.files import check_output
from hf_unlearn.finetune import FineTuning, cache_folder, fine_tuned
from hf_unlearn.fingerprint import weights_fingerprint
from hf_unlearn.ledger import KEY_VARIABLE, Ledger, read_key
from hf_unlearn.predictions import IGNORED
from hf_unlearn.report import UnlearningReport
from hf_unlearn.requests import Request
from hf_unlearn.sequence import RequestSequence, stepped
from hf_unlearn.sharding import is_main, wait_for_all
from hf_unlearn.statistics import RetainStatistics

_SPEC = re.compile(r"(?P<name>[\w.-]+)(?P<slice>\[\d*:\d*\])?")


@dataclass
class DataArguments:
    """Which model and which rows."""

    model_name_or_path: str = setting("", "Folder or Hub id of a causal language model.")
    dataset_name: str = setting("", "Folder of JSON lines, a file a split, or Hub id of a data set.")
    max_rows: int | None = setting(None, "Use at most so many rows of each split for judging.")
    cache_dir: str | None = setting(None, "Where prepared models and statistics are kept; default HF_HOME/hf_unlearn.")


@dataclass
class RunArguments(DataArguments):
    """What to forget, and what to compare with. Splits are `name` or `name[start:stop]`, several with commas."""

    train: str = setting("", "Split that the model was, or is to be, trained on; it includes the forget rows.")
    forget: str = setting("", "Split to forget.")
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
    use_peft: bool = setting(False, "Train a LoRA adapter instead of the weights.")
    lora_r: int = setting(16, "Its rank.")
    lora_alpha: int = setting(32, "Its scale: the update is multiplied by alpha over rank.")
    lora_dropout: float = setting(0.0, "Its dropout.")
    lora_target_modules: list[str] = setting([], "Names of the modules to adapt; default: all linear ones.")
    use_rslora: bool = setting(False, "Scale by alpha over the square root of the rank.")
    merge_adapter: bool = setting(False, "Write the merged model instead of the adapter.")
    samples: int = setting(0, "Show so many answers before and after; only for rows that may be published.")
    fine_tune_seed: int = setting(0, "Seed of the fine-tunes.")
    ledger: str | None = setting(
        None,
        "Folder of the ledger that records this request. The first one makes it; later ones go on from the last one's "
        "model and statistics (pass --statistics only if they were collected afresh on that model), test all earlier "
        "forget sets again, count max_retain_drift over all requests, and stop by what held-out rows had before the "
        "first.",
    )
    ledger_key_file: str | None = setting(
        None, "File of the ledger's key, kept elsewhere; default: the variable HF_UNLEARN_LEDGER_KEY."
    )
    forget_again: bool = setting(
        False, "Train on the rows of a ledger's earlier requests as well, where they are at hand: they may come back."
    )
    energy_step: float = setting(0.0, "Energy that each later request of a ledger protects more than the one before.")


def load_rows(dataset_name: str, splits: str, what: str) -> datasets.Dataset:
    """Rows of `name[start:stop]` splits of a local folder of JSON lines or of a Hub data set's configurations.

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
            return datasets.load_dataset(dataset_name, match["name"], split=part)
        found = [f for suffix in (".json", ".jsonl") if (f := folder / f"{match['name']}{suffix}").is_file()]
        if not found:
            raise DataError(f"{folder} has no {match['name']}.json or .jsonl")
        return datasets.load_dataset("json", data_files=str(found[0]), split=part)
    except DataError:
        raise
    except Exception as error:  # datasets raises many kinds
        raise DataError(f"cannot load split {split!r} of {dataset_name!r}: {str(error).splitlines()[0]}") from error


def load_model(name: str) -> nn.Module:
    """A causal language model in float32 (bf16 weights lose steps of relative size 1e-3), in eval mode.

    It is put on this process's device: collecting comes before any Trainer would do so.
    """
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval().to(PartialState().device)
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


def run(args: RunArguments, config: UnlearningConfig) -> dict[str, UnlearningReport]:
    """One deletion request, or the same one under several constraints; reports by constraint name."""
    names = _constraints(args, config)
    check_output(config.output_dir or "unlearned", config.overwrite_output_dir)
    sequence = _sequence(args, names)
    if sequence is not None:
        config = _continued(args, config, sequence)
    request = prepare(args, config, fisher="kronecker" in names, sequence=sequence)
    reports = {}
    for name in names:
        own = config
        if name != config.constraint:  # its settings are another's
            own = own.but(constraint=name, constraint_settings=None)
        if len(names) > 1:
            own = own.but(output_dir=str(Path(config.output_dir or "unlearned") / name))
        reports[name] = request.fulfil(own)
    return reports


def prepare(
    args: RunArguments, config: UnlearningConfig, *, fisher: bool, sequence: RequestSequence | None = None
) -> Request:
    """Load or make everything that a request needs: rows, original and retrained model, statistics."""
    last = _last_model(args, sequence)
    tokenizer = load_tokenizer(last or args.model_name_or_path)
    collator = default_collator(tokenizer)
    earlier = _begin(args, sequence, tokenizer, config.max_length) if sequence is not None else {}
    splits = _splits(args, tokenizer, config.max_length, earlier)
    train = splits.pop("train")
    timings: dict[str, float] = {}

    def load(folder: Any) -> nn.Module:
        return load_model(str(folder) if folder is not None else args.model_name_or_path)

    cache = cache_folder(args.cache_dir)
    settings = FineTuning(
        args.fine_tune_epochs, args.fine_tune_learning_rate, args.fine_tune_batch_size, seed=args.fine_tune_seed
    )
    if args.fine_tune and not train:
        raise SettingsError("fine_tune needs rows to learn; pass --train")
    if args.retrained == "auto" and "retain" not in splits:
        raise SettingsError("retrained 'auto' needs rows to retrain on; pass --train or --retain")
    if last is not None:
        model = load_model(last)
    elif args.fine_tune:
        model, timings["train original"] = fine_tuned(load, train, settings, collator, cache)
    else:
        model = load(None)
    retrained = None
    if args.retrained == "auto":
        retrained, timings["retrain"] = fine_tuned(load, splits["retain"], settings, collator, cache)
    elif args.retrained not in (None, "none"):
        retrained = load_model(args.retrained)
    start = time.perf_counter()
    if last is not None and sequence is not None and args.statistics is None:
        sequence.check_model(model)
        statistics, timings["collect"] = sequence.statistics(model), time.perf_counter() - start
    else:
        statistics, timings["collect"] = _full_statistics(args, config, model, train, collator, cache, fisher)
    forget, retain = splits["forget"], splits.get("retain")
    for name, rows in splits.items():
        splits[name] = rows[: args.max_rows] if name != "forget" else rows
    return Request(
        model, forget, splits, statistics, args.subtract_forget, retain if args.use_retain_rows else None, retrained,
        tokenizer, collator, _peft_config(args), args.merge_adapter,
        f"{args.dataset_name.rstrip('/').split('/')[-1]} {args.forget}",
        _sampler(forget[: args.samples], tokenizer) if args.samples else None, timings, sequence,
        [row for rows in earlier.values() for row in rows] if args.forget_again else (),
    )  # fmt: skip


def _sequence(args: RunArguments, names: Sequence[str]) -> RequestSequence | None:
    if args.ledger is None:
        for name in ("energy_step", "forget_again"):
            if getattr(args, name):
                raise SettingsError(f"{name} is of requests in a row; pass --ledger with it")
        return None
    if len(names) > 1:
        raise SettingsError("a ledger goes on from one model; run one constraint, without --constraints")
    if args.use_peft and not args.merge_adapter:
        raise SettingsError("a ledger goes on from whole models; pass --merge_adapter True with --use_peft")
    if args.ledger_key_file and Path(args.ledger).resolve() in Path(args.ledger_key_file).resolve().parents:
        raise SettingsError(f"{args.ledger_key_file} is in the ledger's own folder; keep its key elsewhere")
    key = read_key(args.ledger_key_file)
    if key is None:
        raise SettingsError(f"--ledger needs its key; pass --ledger_key_file, or set {KEY_VARIABLE}")
    return RequestSequence(Ledger(args.ledger, key))


def _continued(args: RunArguments, config: UnlearningConfig, sequence: RequestSequence) -> UnlearningConfig:
    """The settings of the request to come: its energy, and what is left of the drift budget."""
    changes: dict[str, Any] = {}
    if args.energy_step:
        if config.constraint != "energy":
            raise SettingsError(f"energy_step is of the energy constraint; the constraint is {config.constraint!r}")
        base, by_layer = config.constraint_settings or {}, config.layer_constraints or {}
        assert isinstance(base, dict) and isinstance(by_layer, dict)  # or the configuration would not exist
        changes["constraint_settings"] = stepped(base, args.energy_step, sequence.number)
        changes["layer_constraints"] = {
            pattern: stepped(own, args.energy_step, sequence.number) if "energy" in own else own
            for pattern, own in by_layer.items()
        } or None
    if config.max_retain_drift is not None:
        left = config.max_retain_drift - sequence.drift_used
        if left <= 0:
            raise SettingsError(
                f"the {len(sequence.done)} requests of {args.ledger} have used {sequence.drift_used:.4f} of "
                f"max_retain_drift {config.max_retain_drift}: no room is left; retrain, or raise it"
            )
        changes["max_retain_drift"] = left
    return config.but(**changes) if changes else config


def _last_model(args: RunArguments, sequence: RequestSequence | None) -> str | None:
    """The model to go on from: where the last request wrote it, or the one named if it was moved."""
    if sequence is None or sequence.model_folder is None:
        return None
    if Path(sequence.model_folder).is_dir():
        return sequence.model_folder
    if not args.model_name_or_path:
        raise ModelError(
            f"the last request's model is no longer in {sequence.model_folder}; pass its new place as "
            "--model_name_or_path"
        )
    return args.model_name_or_path


def _begin(
    args: RunArguments, sequence: RequestSequence, tokenizer: Any, max_length: int | None
) -> dict[str, list[Row]]:
    """Commit to the forget rows, and find those of earlier requests, encoded, by the split names of the report."""

    def load(where: dict[str, Any]) -> Sequence[Row]:
        return load_rows(where["dataset_name"], where["forget"], "forget")

    place = str(Path(args.dataset_name).resolve()) if Path(args.dataset_name).is_dir() else args.dataset_name
    where = {"dataset_name": place, "forget": args.forget}
    sequence.begin(load_rows(args.dataset_name, args.forget, "forget"), where)
    return {
        f"forgotten_{number}": encode_dataset(rows, tokenizer, what=f"forgotten {number}", max_length=max_length)
        for number, rows in sequence.earlier(load).items()
    }


def collect(
    args: DataArguments, rows: str, fisher: bool, output_dir: str, overwrite: bool, max_length: int | None = 512
) -> RetainStatistics:
    """`hf-unlearn collect`: statistics of a split, saved to `output_dir`; rows are cut as `run` cuts them."""
    check_output(output_dir, overwrite)
    tokenizer = load_tokenizer(args.model_name_or_path)
    loaded = load_rows(args.dataset_name, rows, "rows")
    data = encode_dataset(loaded, tokenizer, what="statistics", max_length=max_length)
    model = load_model(args.model_name_or_path)
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
    tokenizer = load_tokenizer(args.model_name_or_path)
    splits = _splits(args, tokenizer, max_length)
    splits.pop("train")
    return evaluate_unlearning(
        load_model(args.model_name_or_path), {name: rows[: args.max_rows] for name, rows in splits.items()},
        original=load_model(original) if original else None,
        retrained=load_model(args.retrained) if args.retrained not in (None, "none") else None,
        collator=default_collator(tokenizer), batch_size=batch_size, seed=seed,
    )  # fmt: skip


def _peft_config(args: RunArguments) -> Any:
    if not args.use_peft:
        return None
    from peft import LoraConfig, TaskType

    targets: Any = args.lora_target_modules or "all-linear"
    try:
        return LoraConfig(
            task_type=TaskType.CAUSAL_LM, r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout,
            target_modules=targets, use_rslora=args.use_rslora,
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


def _splits(
    args: RunArguments, tokenizer: Any, max_length: int | None, earlier: Mapping[str, list[Row]] | None = None
) -> dict[str, list[Row]]:
    """Encoded rows by split; the retain split defaults to the train rows that are not to be forgotten.

    Rows that were forgotten `earlier` are in no train or retain split, and in splits of their own.
    """
    gone = {row_key(row) for rows in (earlier or {}).values() for row in rows}

    def encoded(splits: str, what: str) -> list[Row]:
        return encode_dataset(load_rows(args.dataset_name, splits, what), tokenizer, what=what, max_length=max_length)

    forget = encoded(args.forget, "forget")
    train = [row for row in encoded(args.train, "train") if row_key(row) not in gone] if args.train else []
    if args.retain:
        retain = [row for row in encoded(args.retain, "retain") if row_key(row) not in gone]
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
    for split in (args.eval_splits or "").split(","):
        if split.strip():
            found[split.strip()] = encoded(split.strip(), "eval_splits")
    return found | dict(earlier or {})


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
        samples = []
        for row in rows:
            first = next(i for i, label in enumerate(row["labels"]) if label != IGNORED)
            prompt = torch.tensor([row["input_ids"][:first]], device=next(model.parameters()).device)
            settings = GenerationConfig(
                max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
            model.eval()
            output = model.generate(  # type: ignore[operator]
                prompt, attention_mask=torch.ones_like(prompt), generation_config=settings
            )
            texts = (tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in (prompt[0], output[0, first:]))
            question, text = texts
            samples.append({"prompt": _last_turn(question), "answer": text})
        return samples

    return answer


def _last_turn(prompt: str) -> str:
    """The question alone, without the chat template's roles."""
    lines = [line for line in prompt.splitlines() if line.strip() not in ("", "assistant", "user", "Answer:")]
    return lines[-1].removeprefix("Question: ") if lines else prompt
