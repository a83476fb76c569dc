"""Machine unlearning by gradient projection for Hugging Face Transformers.

Names are imported on first use, so that `import hf_unlearn` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "EnergyConstraint": "constraints.energy",
    "EnergyRidgeConstraint": "constraints.energy_ridge",
    "KroneckerConstraint": "constraints.kronecker",
    "Layer": "models.layers",
    "RetainStatistics": "statistics.retain_statistics",
    "RidgeConstraint": "constraints.ridge",
    "UnlearningConfig": "trainer.config",
    "UnlearningError": "errors",
    "UnlearningReport": "evaluation.report",
    "UnlearningTrainer": "trainer.trainer",
    "audit": "evaluation.attacks.audit",
    "collect_statistics": "statistics.collect",
    "constrain_optimizer": "constraints.step_constrainer",
    "evaluate_unlearning": "evaluation.evaluate",
    "freeze_unprotected": "models.trainable",
    "purge_history": "core.hub",
    "push_unlearned_model": "publishing.model_folder",
    "register_layer": "models.layers",
}

__all__ = [
    "EnergyConstraint",
    "EnergyRidgeConstraint",
    "KroneckerConstraint",
    "Layer",
    "RetainStatistics",
    "RidgeConstraint",
    "UnlearningConfig",
    "UnlearningError",
    "UnlearningReport",
    "UnlearningTrainer",
    "audit",
    "collect_statistics",
    "constrain_optimizer",
    "evaluate_unlearning",
    "freeze_unprotected",
    "purge_history",
    "push_unlearned_model",
    "register_layer",
]

if TYPE_CHECKING:
    from hf_unlearn.constraints.energy import EnergyConstraint
    from hf_unlearn.constraints.energy_ridge import EnergyRidgeConstraint
    from hf_unlearn.constraints.kronecker import KroneckerConstraint
    from hf_unlearn.constraints.ridge import RidgeConstraint
    from hf_unlearn.constraints.step_constrainer import constrain_optimizer
    from hf_unlearn.core.hub import purge_history
    from hf_unlearn.errors import UnlearningError
    from hf_unlearn.evaluation.attacks.audit import audit
    from hf_unlearn.evaluation.evaluate import evaluate_unlearning
    from hf_unlearn.evaluation.report import UnlearningReport
    from hf_unlearn.models.layers import Layer, register_layer
    from hf_unlearn.models.trainable import freeze_unprotected
    from hf_unlearn.publishing.model_folder import push_unlearned_model
    from hf_unlearn.statistics.collect import collect_statistics
    from hf_unlearn.statistics.retain_statistics import RetainStatistics
    from hf_unlearn.trainer.config import UnlearningConfig
    from hf_unlearn.trainer.trainer import UnlearningTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hf_unlearn' has no attribute {name!r}")
    return getattr(import_module(f"hf_unlearn.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
