"""Machine unlearning by gradient projection for Hugging Face Transformers.

Names are imported on first use, so that `import hf_unlearn` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "EnergyConstraint": "constraints",
    "EnergyRidgeConstraint": "constraints",
    "KroneckerConstraint": "constraints",
    "Layer": "layers",
    "RetainStatistics": "statistics",
    "RidgeConstraint": "constraints",
    "UnlearningConfig": "config",
    "UnlearningError": "errors",
    "UnlearningReport": "report",
    "UnlearningTrainer": "trainer",
    "audit": "attacks",
    "collect_statistics": "collect",
    "constrain_optimizer": "optimizer",
    "evaluate_unlearning": "evaluation",
    "freeze_unprotected": "coverage",
    "purge_history": "hub",
    "push_unlearned_model": "publish",
    "register_layer": "layers",
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
    from hf_unlearn.attacks import audit
    from hf_unlearn.collect import collect_statistics
    from hf_unlearn.config import UnlearningConfig
    from hf_unlearn.constraints import EnergyConstraint, EnergyRidgeConstraint, KroneckerConstraint, RidgeConstraint
    from hf_unlearn.coverage import freeze_unprotected
    from hf_unlearn.errors import UnlearningError
    from hf_unlearn.evaluation import evaluate_unlearning
    from hf_unlearn.hub import purge_history
    from hf_unlearn.layers import Layer, register_layer
    from hf_unlearn.optimizer import constrain_optimizer
    from hf_unlearn.publish import push_unlearned_model
    from hf_unlearn.report import UnlearningReport
    from hf_unlearn.statistics import RetainStatistics
    from hf_unlearn.trainer import UnlearningTrainer


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hf_unlearn' has no attribute {name!r}")
    return getattr(import_module(f"hf_unlearn.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
