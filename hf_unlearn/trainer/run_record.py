"""The record of a run: what a report says about the trainer, its settings and its model."""

import inspect
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name
from torch import nn
from transformers.modelcard import TASK_MAPPING

from hf_unlearn.constraints.base import Constraint
from hf_unlearn.constraints.binding import resolve_constraints
from hf_unlearn.constraints.registry import constraint_for
from hf_unlearn.core.provenance import hardware, package_versions
from hf_unlearn.evaluation.report import UnlearningReport, plain
from hf_unlearn.losses import UnlearningLoss
from hf_unlearn.models.adapters import without_wrapper
from hf_unlearn.statistics.retain_statistics import RetainStatistics
from hf_unlearn.statistics.sketch import is_sketch
from hf_unlearn.trainer.config import UnlearningConfig

if TYPE_CHECKING:
    from hf_unlearn.trainer.trainer import UnlearningTrainer

NO_CONSTRAINT = "every step"  # what "none" allows, in the words of a card
_REPORTED = frozenset(
    "learning_rate final_learning_rate momentum optim optim_args adam_beta1 adam_beta2 adam_epsilon "
    "lr_scheduler_type lr_scheduler_kwargs warmup_steps num_train_epochs max_steps per_device_train_batch_size "
    "gradient_accumulation_steps max_grad_norm weight_decay relative_step seed bf16 fp16 eval_strategy eval_steps "
    "forget_metric forget_target row_stopping adversary_steps adversary_learning_rate max_retain_drift "
    "max_retain_drop layer_constraints allow_exposed freeze train_only max_length".split()
)


def run_report(trainer: "UnlearningTrainer") -> UnlearningReport:
    """Return a report of what the trainer has done so far, with nothing measured."""
    rows = trainer.train_dataset
    report = UnlearningReport(versions=package_versions(), hardware=hardware())
    report.request = {"rows": len(rows), "date": datetime.now(timezone.utc).date().isoformat()}
    report.data = dict(trainer.row_counts)
    record_run(report, trainer, retain_rows=0 if rows.retain is None else len(rows.retain))
    return report


def fill_missing(report: UnlearningReport, run: UnlearningReport) -> UnlearningReport:
    """Fill the empty fields of `report` from the report of the run, in place, and return it."""
    for name in ("request", "method", "settings", "versions", "hardware", "history", "drift", "outcome"):
        if not getattr(report, name):
            setattr(report, name, getattr(run, name))
    report.data = {**report.data, **run.data}
    return report


def record_run(
    report: UnlearningReport, trainer: "UnlearningTrainer", *, retain_rows: int = 0, merged: bool = False
) -> None:
    """Fill `method`, `settings`, `history`, `drift` and `outcome` of `report` from a trainer that has run.

    Args:
        report: Changed in place.
        trainer: The trainer.
        retain_rows: Number of retain rows that the loss read.
        merged: Whether an adapter, if there is one, is published merged into the weights.
    """
    args, statistics, drift = trainer.args, trainer.constrainer.statistics, trainer.constrainer.drift()
    constraint = _default_constraint(args)
    report.method = {
        "loss": trainer.loss.name,
        "loss_summary": _loss_summary(trainer.loss),
        "loss_settings": trainer.loss.all_settings,
        "constraint": args.constraint,
        "constraint_summary": NO_CONSTRAINT if constraint is None else constraint.summary(),
        "constraint_settings": {} if constraint is None else asdict(constraint),  # type: ignore[call-overload]
        "retained": _retained(args, statistics),
        "sketched": _sketched(statistics),
        "statistics": statistics and {"rows": statistics.rows, "weights": statistics.weights, "data": statistics.data},
        "coverage": {
            "protected": len(trainer.coverage.protected),
            "frozen": len(trainer.coverage.frozen),
            "exposed": list(trainer.coverage.exposed),
        },
        "adapter": _adapter(trainer.model, merged),
        **_base_model(args, trainer.model),
        "task": _task(trainer.model),
        "stopped": trainer.stop_reason,
        "steps": trainer.state.global_step,
        "retain_rows_used": retain_rows,
        "rows_rehearsed": trainer.rows_rehearsed,
    }
    unused = ("adam_",) if "adam" not in str(args.optim) else ("momentum",)  # settings of other optimizers
    report.settings = {k: v for k, v in args.to_dict().items() if k in _REPORTED and not k.startswith(unused)}
    report.settings["forget_metric"] = args.stopping_metric
    report.history = list(trainer.state.log_history)
    report.drift = asdict(drift) | {"relative": drift.relative}
    report.outcome = {} if trainer.outcome is None else plain(asdict(trainer.outcome))


def name_base_model(model: nn.Module, args: UnlearningConfig) -> None:
    """Name `args.base_model` in an adapter's configuration, in place of the folder that it was loaded from."""
    name, _, revision = (args.base_model or "").partition("@")
    if not name:
        return
    for config in (getattr(model, "peft_config", None) or {}).values():
        config.base_model_name_or_path, config.revision = name, revision or None


def _default_constraint(args: UnlearningConfig) -> Constraint | None:
    """Return the constraint of the layers that `layer_constraints` does not name."""
    built = args.build_constraint()
    return built["*"] if isinstance(built, Mapping) else built


def _loss_summary(loss: UnlearningLoss) -> str | None:
    """Return the first line of the docstring of the forget term, without the verb that docstrings begin with."""
    first_line = (inspect.getdoc(loss.kind.term) or "").partition("\n")[0]
    return first_line.removeprefix("Return ") or None


def _retained(args: UnlearningConfig, statistics: RetainStatistics | None) -> dict[str, Any] | None:
    """Return how much the constraint protects entirely, as means over the layers where it protects directions.

    `energy` is the share of `trace(gram)` and `rank` the share of the dimensions in the basis; `instead` describes the
    constraint that these statistics resolved to, if it is another one. None for constraints that only shrink.
    """
    chosen, energies, ranks, instead = args.build_constraint(), [], [], None
    resolved = resolve_constraints(statistics, chosen) if statistics is not None else {}
    for layer, bound in resolved.items():
        constraint = constraint_for(layer, chosen)
        if bound is not None and type(bound) is not type(constraint):
            instead = bound.summary()
        for gram in statistics.gram_eigen(layer).blocks() if statistics is not None else ():
            if bound is not None and constraint is not None and constraint.protected_rank(gram) is not None:
                values_I, rank = gram.spectrum_I, bound.protected_rank(gram) or 0
                energies.append((values_I[:rank].sum() / values_I.sum()).item() if rank else 0.0)
                ranks.append(rank / len(values_I))
    if not ranks:
        return None
    shares: dict[str, Any] = {"energy": sum(energies) / len(ranks), "rank": sum(ranks) / len(ranks)}
    return shares | {"layers": len(ranks)} | ({"instead": instead} if instead else {})


def _sketched(statistics: RetainStatistics | None) -> dict[str, float] | None:
    """Return the number of sketched Gram matrices, and the largest share of the energy that a sketch misses."""
    sums = statistics.gram_sums if statistics is not None else {}
    names = [name for name, tensor in sums.items() if is_sketch(tensor.shape)]
    if statistics is None or not names:
        return None
    missed = [block.missed_share for name in names for block in statistics.gram_eigen(name).blocks()]
    return {"grams": len(names), "missed": max(missed)}


def _adapter(model: nn.Module, merged: bool) -> dict[str, Any] | None:
    """Return the settings of the adapter that was trained; None for full weights."""
    for config in (getattr(model, "peft_config", None) or {}).values():
        return {
            "type": getattr(config.peft_type, "value", str(config.peft_type)),
            "r": config.r,
            "lora_alpha": config.lora_alpha,
            "lora_dropout": config.lora_dropout,
            "use_rslora": config.use_rslora,
            "target_modules": config.target_modules
            if isinstance(config.target_modules, str)
            else sorted(config.target_modules or []),
            "merged": merged,
        }
    return None


def _task(model: nn.Module) -> str | None:
    """Return the Hub's name of the task of a model class of transformers."""
    class_name = type(without_wrapper(model)).__name__
    for task, names in TASK_MAPPING.items():
        if any(class_name == name or (isinstance(name, tuple) and class_name in name) for name in names.values()):
            return task
    return None


def _base_model(args: UnlearningConfig, model: nn.Module) -> dict[str, Any]:
    """Return a Hub id and its commit, or only the last part of a local folder's path: the report is published."""
    if args.base_model:
        name, _, revision = args.base_model.partition("@")
        return {"base_model": name, "base_model_revision": revision or None, "base_model_is_local": False}
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", "") or ""
    local = bool(name) and Path(name).exists()
    return {
        "base_model": (Path(name).resolve().name if local else name) or None,
        "base_model_revision": None if local else getattr(config, "_commit_hash", None) or _only_snapshot(name),
        "base_model_is_local": local,
    }


def _only_snapshot(name: str) -> str | None:
    """Return the commit in the client's cache, if there is exactly one; transformers does not keep it."""
    if not name:
        return None
    folder = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "snapshots"
    commits = [path.parent.name for path in folder.glob("*/config.json")]
    return commits[0] if len(commits) == 1 else None
