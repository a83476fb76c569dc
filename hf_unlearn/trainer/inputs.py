"""Prepared inputs of `UnlearningTrainer`: a loaded model, encoded rows, checked statistics, frozen parameters."""

import glob
import os
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn
from transformers import set_seed

from hf_unlearn.constraints.base import ConstraintLike
from hf_unlearn.constraints.registry import needs_fisher
from hf_unlearn.constraints.step_constrainer import StepConstrainer
from hf_unlearn.core.processes import gather
from hf_unlearn.core.text import ShortRepr
from hf_unlearn.data.batches import default_collator, with_content_mask
from hf_unlearn.data.checks import check_container, require_alternates, require_disjoint, require_labels
from hf_unlearn.data.encoded_checks import check_encoded
from hf_unlearn.data.encoding import encode_dataset
from hf_unlearn.data.formats import Rows, rows_of
from hf_unlearn.data.pairs import PairedCollator, PairedDataset
from hf_unlearn.data.rehearsal import joined, split_held_out
from hf_unlearn.errors import SettingsError, StatisticsError
from hf_unlearn.losses import UnlearningLoss, build_loss
from hf_unlearn.losses.original_outputs import frozen_copy, original_outputs
from hf_unlearn.losses.registry import ForgetTerm, OriginalModel
from hf_unlearn.models.adapters import with_adapter
from hf_unlearn.models.layers import find_layers
from hf_unlearn.models.loading import load_model_and_processor
from hf_unlearn.models.readiness import check_loaded, check_saveable
from hf_unlearn.models.tasks import Collator, ProcessingClass
from hf_unlearn.models.trainable import (
    Coverage,
    check_not_frozen,
    freeze_all_but,
    freeze_unprotected,
    is_weight_of,
)
from hf_unlearn.statistics.collect import collect_with_options
from hf_unlearn.statistics.options import CollectionOptions
from hf_unlearn.statistics.retain_statistics import RetainStatistics
from hf_unlearn.trainer.config import FORGET_METRICS, UnlearningConfig

if TYPE_CHECKING:
    from peft import PeftConfig

StatisticsLike: TypeAlias = "RetainStatistics | str | os.PathLike"
SPLIT_METRICS = ("loss", "probability", "accuracy", "entropy")
"""What an evaluation of a split reports."""
FORGET_SPLIT_METRICS = ("content_loss", "function_loss", *(f"relearned_{name}" for name in FORGET_METRICS))
"""What an evaluation of the split `forget` may report besides: of content tokens, and against an attacker."""
Encoder: TypeAlias = Callable[["Rows | None", str], Any]


@dataclass(frozen=True, repr=False)
class TrainerInputs(ShortRepr):
    """Everything that a run needs, loaded, encoded and checked.

    Attributes:
        model: The model to train, with its adapter if it has one; what must not train is frozen.
        processing_class: Tokenizer or image processor.
        loss: The loss with its settings.
        collator: Collates plain rows.
        forget, retain, holdout: Encoded rows; None for sets that were not given. Without the rows in `rehearsal`.
        rehearsal: Encoded rows of the held-out set, or others, that the retain term of the loss reads besides `retain`.
        splits: Encoded rows to evaluate on, by name.
        statistics: Statistics of the retain rows on this model; None for runs without.
        constraint: The constraint, or constraints by layer pattern; None for none.
        coverage: Which parameters are protected, frozen and exposed.
    """

    model: nn.Module
    processing_class: "ProcessingClass | None"
    loss: UnlearningLoss
    collator: Collator
    forget: "Rows"
    retain: "Rows | None"
    holdout: "Rows | None"
    rehearsal: "Rows | None"
    splits: dict[str, "Rows"]
    statistics: RetainStatistics | None
    constraint: ConstraintLike
    coverage: Coverage

    def training_pairs(self, seed: int) -> PairedDataset:
        """Return the forget rows, each with a row of the retain term and an alternate answer if the loss reads them."""
        retain = joined(self.retain, self.rehearsal) if self.loss.has_retain_term else None
        return PairedDataset(self.forget, retain, seed, bool(self.loss.kind.alternate_answer))

    def paired_collator(self, *, attacker: bool) -> PairedCollator:
        """Return the collator of `training_pairs`; with an `attacker` a third of the rows are a batch of their own."""
        return PairedCollator(self.collator, attacker=attacker)


def prepare_inputs(
    model: str | os.PathLike | nn.Module,
    args: UnlearningConfig,
    forget_dataset: "Rows | None",
    retain_dataset: "Rows | None" = None,
    *,
    statistics: "StatisticsLike | None" = None,
    holdout_dataset: "Rows | None" = None,
    rehearsal_dataset: "Rows | None" = None,
    eval_dataset: "Mapping[str, Rows] | None" = None,
    data_collator: Collator | None = None,
    processing_class: "ProcessingClass | None" = None,
    peft_config: "PeftConfig | None" = None,
    loss: str | ForgetTerm | UnlearningLoss | None = None,
) -> TrainerInputs:
    """Load, encode and check the arguments of `UnlearningTrainer`, which documents them and the errors."""
    sets = {"forget": forget_dataset, "retain": retain_dataset}
    sets |= {"holdout": holdout_dataset, "rehearsal": rehearsal_dataset}
    for what, rows in sets.items():
        check_container(rows, what)
    if isinstance(model, nn.Module):
        network = model
    else:
        network, processing_class = load_model_and_processor(model, processing_class)
    check_loaded(network)
    check_saveable(network, processing_class)
    built_loss = args.build_loss() if loss is None else build_loss(loss)
    encode = row_encoder(network, processing_class, args, built_loss)
    forget, retain = encode(forget_dataset, "forget"), encode(retain_dataset, "retain")
    holdout, rehearsal = encode(holdout_dataset, "holdout"), encode(rehearsal_dataset, "rehearsal")
    check_rows(built_loss, forget, retain, joined(holdout, rehearsal))
    if built_loss.rehearses and rehearsal is None and holdout is not None:
        rehearsal, holdout = split_held_out(holdout)
    collator = with_content_mask(data_collator or default_collator(processing_class))
    constraint = args.build_constraint()
    usable = usable_statistics(network, statistics, retain, collator, args)
    if peft_config is not None:
        set_seed(args.seed)  # a resumed run starts from the same A
        network = with_adapter(network, peft_config)
    coverage = freeze_for_run(network, usable, constraint, args)
    splits = encode_splits(eval_dataset, encode)
    if holdout_dataset is not None or args.forget_target is not None or built_loss.reference_contents:
        splits = {"forget": forget, **splits}
    return TrainerInputs(
        network,
        processing_class,
        built_loss,
        collator,
        forget,
        retain,
        holdout,
        rehearsal,
        splits,
        usable,
        constraint,
        coverage,
    )


COUNTERPARTS = {
    "train_dataset": "forget_dataset (rows to forget) and retain_dataset (rows to keep)",
    "test_dataset": "holdout_dataset (rows that the model never saw)",
    "tokenizer": "processing_class",
    "ref_model": "original_model",
    "compute_loss_func": "loss",
    "model_init": "model",
    "optimizer_cls_and_kwargs": "optimizers, or optim of UnlearningConfig",
}
"""Arguments of `Trainer` and of trl's trainers that `UnlearningTrainer` has under another name."""


def refuse_other_arguments(arguments: Mapping[str, object]) -> None:
    """Raise `SettingsError` for arguments of other trainers, with the ones to pass instead."""
    for name in arguments:
        instead = COUNTERPARTS.get(name)
        advice = f"pass {instead} instead" if instead else "its arguments are those of help(UnlearningTrainer)"
        raise SettingsError(f"UnlearningTrainer has no argument {name!r}: {advice}")


def unlearning_config(args: object) -> UnlearningConfig:
    """Return `args`; raise `SettingsError` if they are not an `UnlearningConfig`."""
    if isinstance(args, UnlearningConfig):
        return args
    kind = "nothing" if args is None else f"a {type(args).__name__}"
    raise SettingsError(
        f"args is {kind}; pass an UnlearningConfig, which takes every setting of TrainingArguments and those of "
        "unlearning: UnlearningConfig(output_dir, ...)"
    )


def check_best_metric(args: UnlearningConfig, splits: Collection[str], *, others: bool) -> None:
    """Raise `SettingsError` if a run follows a metric that its evaluations will not have.

    Args:
        args: Settings; `metric_for_best_model` names the metric.
        splits: Names of the evaluation splits.
        others: Whether evaluations may have metrics besides those of the package.
    """
    name = args.metric_for_best_model
    if name is None or others:
        return
    known = [f"{split}_{metric}" for split in splits for metric in SPLIT_METRICS]
    known += [f"forget_{metric}" for metric in FORGET_SPLIT_METRICS if "forget" in splits]
    if name.removeprefix("eval_") not in known:
        have = f"the evaluations of this run have {', '.join(known)}" if known else "this run has no evaluation split"
        raise SettingsError(f"metric_for_best_model is {name!r}, but {have}; name one of a split in eval_dataset")


def row_encoder(
    model: nn.Module, processing_class: "ProcessingClass | None", args: UnlearningConfig, loss: UnlearningLoss
) -> Encoder:
    """Return a function `(data set, its name) -> encoded rows`, which returns None for None."""

    def encode(dataset: "Rows | None", what: str) -> Any:
        if dataset is None and what != "forget":
            return None
        seed = args.seed if what == "forget" and loss.kind.alternate_answer == "idk" else None
        rows = encode_dataset(
            dataset, processing_class, what=what, max_length=args.max_length, model=model, idk_seed=seed
        )
        check_encoded(rows, what, model, labels=what == "forget")
        return rows

    return encode


def check_rows(loss: UnlearningLoss, forget: "Rows", retain: "Rows | None", holdout: "Rows | None") -> None:
    """Raise `DataError` or `SettingsError` if the sets overlap, or if the loss cannot use them."""
    for other, what in ((retain, "retain"), (holdout, "holdout")):
        if other is not None:
            require_disjoint(forget, other, what)
    loss.check_labels(tokens=require_labels(forget, "forget"))
    if loss.kind.alternate_answer:
        require_alternates(forget, loss.name)
    if loss.kind.needs_retain and retain is None:
        raise SettingsError(f"loss {loss.name!r} needs retain rows; pass retain_dataset or choose another loss")


def encode_splits(eval_dataset: "Mapping[str, Rows] | None", encode: Encoder) -> dict[str, "Rows"]:
    """Encode the evaluation splits by name; raise `SettingsError` if they have no names."""
    if eval_dataset is None:
        return {}
    if not isinstance(eval_dataset, Mapping):
        raise SettingsError("eval_dataset must name its splits, such as {'retain': rows}")
    return {name: encode(rows, name) for name, rows in eval_dataset.items()}


def usable_statistics(
    model: nn.Module,
    statistics: "StatisticsLike | None",
    retain: "Rows | None",
    collator: Collator,
    args: UnlearningConfig,
) -> RetainStatistics | None:
    """Return the statistics, loaded or collected if necessary, and checked against the model."""
    if statistics is None and args.constraint != "none":
        return _collected_statistics(model, retain, collator, args)
    if isinstance(statistics, (str, os.PathLike)):
        statistics = RetainStatistics.from_pretrained(statistics, keep_on=args.keep_statistics_on)
    if statistics is not None:
        statistics.check_model(model)
    identities = gather(statistics and (statistics.weights, statistics.data))
    if len(set(identities)) > 1:
        raise StatisticsError(
            f"{len(identities)} processes have {len(set(identities))} different statistics; pass the same to all"
        )
    if statistics is not None and args.keep_statistics_on != "device":
        statistics = statistics.kept_on(args.keep_statistics_on)
    return statistics


def _collected_statistics(
    model: nn.Module, retain: "Rows | None", collator: Collator, args: UnlearningConfig
) -> RetainStatistics:
    if retain is None:
        raise SettingsError(
            f"constraint {args.constraint!r} needs statistics; pass `statistics`, or retain_dataset to collect "
            "them, or choose constraint none"
        )
    options = CollectionOptions.from_config(args, fisher=needs_fisher(args.constraint))
    return collect_with_options(model, retain, options, collator=collator)


def freeze_for_run(
    model: nn.Module, statistics: RetainStatistics | None, constraint: ConstraintLike, args: UnlearningConfig
) -> Coverage:
    """Freeze what must not train, and return the coverage; without a constraint the same weights train, all exposed."""
    layers = list(statistics.layers if statistics is not None else find_layers(model))
    names = [name for name, _ in model.named_parameters()]
    left_out = [n for n in names if args.train_only and not any(fnmatchcase(n, p) for p in args.train_only)]
    check_not_frozen(model, layers, args.allow_exposed, [*args.freeze, *map(glob.escape, left_out)])
    freeze_all_but(model, args.train_only)
    if constraint is not None and statistics is not None:
        return freeze_unprotected(model, statistics.layers, args.allow_exposed, args.freeze)
    exposed = [name for name, _ in model.named_parameters() if is_weight_of(name, layers)]
    return freeze_unprotected(model, (), [*exposed, *args.allow_exposed], args.freeze)


def precision_of(args: UnlearningConfig) -> str:
    """Return the name of the precision of forward passes."""
    return "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"


def original_source(
    inputs: TrainerInputs,
    args: UnlearningConfig,
    constrainer: StepConstrainer,
    copy: nn.Module | None = None,
    scope: Callable[[], AbstractContextManager] = nullcontext,
) -> OriginalModel:
    """Return where the loss gets the original model's predictions: a copy, the disk, or the original weights.

    Args:
        inputs: Prepared inputs; their model has its original weights.
        args: Names the folder on disk, if there is one.
        constrainer: Can put the original weights into the model temporarily, which needs no copy.
        copy: A copy of the original model.
        scope: Context of the forward passes whose outputs go to disk (autocast).

    Raises:
        SettingsError: Both a copy and a folder, or a copy that is the trained model itself.
    """
    folder = args.original_logprobs
    if copy is not None:
        if folder is not None or copy is inputs.model:
            raise SettingsError("original_model must be a separate copy; pass either it or original_logprobs")
        return frozen_copy(copy.to(args.device))
    if folder is None or not inputs.loss.needs_original:
        return constrainer.original
    rows = {"forget": inputs.forget, "retain": joined(inputs.retain, inputs.rehearsal)}
    if inputs.loss.kind.alternate_answer:
        rows["alternate"] = [row["alternate"] for row in rows_of(inputs.forget)]
    stored = original_outputs(
        inputs.model,
        inputs.loss,
        rows,
        folder,
        collator=inputs.collator,
        batch_size=args.per_device_eval_batch_size,
        precision=precision_of(args),
        scope=scope,
    )
    return lambda: nullcontext(stored)
