"""What a report says of a run, read off its trainer."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.file_download import repo_folder_name
from torch import nn
from transformers.modelcard import TASK_MAPPING

from hf_unlearn.constraints.binding import resolve_constraints
from hf_unlearn.constraints.registry import constraint_for
from hf_unlearn.evaluation.report import UnlearningReport
from hf_unlearn.models.adapters import without_wrapper
from hf_unlearn.statistics.retain_statistics import RetainStatistics
from hf_unlearn.statistics.sketch import is_sketch
from hf_unlearn.trainer.config import UnlearningConfig

_REPORTED = frozenset(
    "learning_rate final_learning_rate momentum optim optim_args adam_beta1 adam_beta2 adam_epsilon "
    "lr_scheduler_type lr_scheduler_kwargs warmup_steps num_train_epochs max_steps per_device_train_batch_size "
    "gradient_accumulation_steps max_grad_norm weight_decay relative_step seed bf16 fp16 eval_strategy eval_steps "
    "forget_metric forget_target row_stopping adversary_steps adversary_learning_rate max_retain_drift "
    "max_retain_drop layer_constraints allow_exposed freeze train_only max_length".split()
)


def describe(report: UnlearningReport, trainer: Any, *, retain_rows: int = 0, merged: bool = False) -> None:
    """Fill `method`, `settings`, `history` and `drift` of `report` from a trainer that has run.

    Args:
        report: Changed in place.
        trainer: An `UnlearningTrainer`.
        retain_rows: Number of retain rows that the loss read.
        merged: An adapter, if there is one, is published merged into the weights.
    """
    args, statistics, drift = trainer.args, trainer.constrainer.statistics, trainer.constrainer.drift()
    report.method = {
        "loss": trainer.loss.name,
        "loss_settings": trainer.loss.all_settings,
        "constraint": args.constraint,
        "constraint_settings": _constraint_settings(args),
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
    }
    others = ("adam_",) if "adam" not in str(args.optim) else ("momentum",)  # another optimizer's settings
    report.settings = {k: v for k, v in args.to_dict().items() if k in _REPORTED and not k.startswith(others)}
    report.history = list(trainer.state.log_history)
    report.drift = asdict(drift) | {"relative": drift.relative}


def name_base_model(model: nn.Module, args: UnlearningConfig) -> None:
    """Let an adapter's configuration name `args.base_model` instead of the folder that it was loaded from."""
    name, _, revision = (args.base_model or "").partition("@")
    for config in (getattr(model, "peft_config", None) or {}).values() if name else ():
        config.base_model_name_or_path, config.revision = name, revision or None


def _constraint_settings(args: UnlearningConfig) -> dict[str, Any]:
    built = args.build_constraint()
    built = built["*"] if isinstance(built, Mapping) else built
    return asdict(built) if built is not None else {}  # type: ignore[call-overload]


def _retained(args: UnlearningConfig, statistics: RetainStatistics | None) -> dict[str, float] | None:
    """Means over the layers under an energy constraint: share of `trace(gram)`, and of the dimensions, in the basis."""
    asked, energies, ranks = args.build_constraint(), [], []
    resolved = resolve_constraints(statistics, asked) if statistics is not None else {}
    for layer, kind in resolved.items():
        chosen = constraint_for(layer, asked)
        for gram in statistics.gram_eigen(layer).blocks() if statistics is not None else ():
            if kind is not None and chosen is not None and chosen.protected_rank(gram) is not None:
                values_I, rank = gram.spectrum_I, kind.protected_rank(gram) or 0
                energies.append((values_I[:rank].sum() / values_I.sum()).item() if rank else 0.0)
                ranks.append(rank / len(values_I))
    if not ranks:
        return None
    return {"energy": sum(energies) / len(ranks), "rank": sum(ranks) / len(ranks), "layers": len(ranks)}


def _sketched(statistics: RetainStatistics | None) -> dict[str, float] | None:
    """How many Grams are sketches, and the largest share of the energy of one that its sketch has missed."""
    sums = statistics.gram_sums if statistics is not None else {}
    names = [name for name, tensor in sums.items() if is_sketch(tensor.shape)]
    if statistics is None or not names:
        return None
    missed = [block.missed_share for name in names for block in statistics.gram_eigen(name).blocks()]
    return {"grams": len(names), "missed": max(missed)}


def _adapter(model: nn.Module, merged: bool) -> dict[str, Any] | None:
    """Settings of the adapter that was trained; None for full weights."""
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
    """The Hub's name of what a model class of transformers is for."""
    kind = type(without_wrapper(model)).__name__
    for task, names in TASK_MAPPING.items():
        if any(kind == name or (isinstance(name, tuple) and kind in name) for name in names.values()):
            return task
    return None


def _base_model(args: UnlearningConfig, model: nn.Module) -> dict[str, Any]:
    """A Hub id and its commit; of a local folder the last part of its name alone: the report is published."""
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
    """The commit in the client's cache, if there is one alone: transformers no longer keeps it with the model."""
    if not name:
        return None
    folder = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model") / "snapshots"
    found = [path.parent.name for path in folder.glob("*/config.json")]
    return found[0] if len(found) == 1 else None
