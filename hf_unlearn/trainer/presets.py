"""Presets: settings that belong together, by name. They replace defaults; explicit settings take precedence."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from hf_unlearn.core.registry import suggestion
from hf_unlearn.errors import SettingsError

PRESETS: dict[str, Mapping[str, Any]] = {
    "default": {},
    "paper": {  # PGU (Hoang et al., WACV 2024) for single rows, from its authors' code: small_vgg on CIFAR-10
        "loss": "pgu",
        "loss_settings": {"offset": 0.05, "entropy_weight": 0.2},
        "constraint": "energy",
        "constraint_settings": {"energy": 0.95, "spectrum": "singular_values"},
        "relative_step": False,
        "optim": "sgd",
        "momentum": 0.0,
        "learning_rate": 0.05,
        "final_learning_rate": 0.01,
        "num_train_epochs": 100,
        "per_device_train_batch_size": 128,
        "forget_metric": "accuracy",
        "row_stopping": False,
    },
    "robust": {  # withstands relearning, for six more backward passes per step
        "adversary_steps": 5,
        "learning_rate": 5e-4,  # rows are pushed and pulled: more and smaller steps, with less momentum
        "momentum": 0.5,
        "per_device_train_batch_size": 32,
        "num_train_epochs": 100,
        "eval_strategy": "steps",
        "eval_steps": 5,
    },
}

CHOICES = {"loss": ("loss_settings",), "constraint": ("constraint_settings", "layer_constraints")}
"""Settings that choose something by name, and the settings that belong to the choice."""


def preset(name: str) -> dict[str, Any]:
    """Return a copy of the settings of a preset; raise `SettingsError` if it does not exist."""
    if name not in PRESETS:
        raise SettingsError(f"unknown preset {name!r}; {suggestion(name, list(PRESETS))}")
    return deepcopy(dict(PRESETS[name]))


def overridden(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `settings` with `changes` applied.

    If a change chooses another loss or constraint, the settings of the previous one are dropped.

    >>> overridden({"loss": "npo", "loss_settings": {"beta": 0.1}}, {"loss": "pgu"})
    {'loss': 'pgu'}
    """
    changed = [choice for choice in CHOICES if changes.get(choice, settings.get(choice)) != settings.get(choice)]
    dropped = {name for choice in changed for name in CHOICES[choice]}
    return {name: value for name, value in settings.items() if name not in dropped} | dict(changes)
