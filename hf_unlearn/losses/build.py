"""Build a loss from its name and settings."""

from collections.abc import Mapping
from dataclasses import fields
from inspect import signature
from typing import Any

from hf_unlearn.core.settings import is_number, require_numbers
from hf_unlearn.errors import SettingsError
from hf_unlearn.losses.base import UnlearningLoss
from hf_unlearn.losses.dual_weight import DualWeight
from hf_unlearn.losses.registry import RETAIN_TERMS, ForgetTerm, LossKind, find_loss

DEFAULT_LAYER = 7  # of RMU (Li et al., ICML 2024)


def build_loss(loss: str | ForgetTerm | UnlearningLoss, settings: Mapping[str, Any] | None = None) -> UnlearningLoss:
    """Build a loss with its settings.

    >>> from hf_unlearn import build_loss
    >>> loss = build_loss("npo", {"beta": 0.2})
    >>> loss.all_settings
    {'gamma': 1.0, 'alpha': 1.0, 'retain': 'nll', 'beta': 0.2}
    >>> build_loss("npo", {"betta": 0.2})
    Traceback (most recent call last):
        ...
    hf_unlearn.errors.SettingsError: loss 'npo' has no setting 'betta', only gamma, alpha, retain, beta

    Args:
        loss: A registered name, `module:function` of a forget term (see `LossKind.term`; the working folder is searched
            for the module too), a forget term itself, or a built loss, which is returned unchanged. A term that is not
            registered must give one value per label and cannot read the original model.
        settings: `gamma`, `alpha`, `retain` ("nll", "kl" or "hidden") and the term's own settings, which are its
            arguments after the first two; `layer` if hidden states are read; the settings of `DualWeight` if the loss
            has a dual weight.

    Raises:
        SettingsError: Unknown loss or setting, or a value that is not a number although the default is one.
    """
    if isinstance(loss, UnlearningLoss):
        return loss
    name, kind = find_loss(loss)
    settings = dict(settings or {})
    dual_settings = DualWeight.setting_names() if kind.dual_weight else []
    _check_settings(name, kind, settings, dual_settings)
    reads_layer = kind.reads_hidden or settings.get("retain") == "hidden"
    gamma, alpha = settings.pop("gamma", kind.gamma), settings.pop("alpha", kind.alpha)
    retain, layer = settings.pop("retain", kind.retain), settings.pop("layer", DEFAULT_LAYER if reads_layer else None)
    if retain not in RETAIN_TERMS:
        raise SettingsError(f"retain must be 'nll', 'kl' or 'hidden', got {retain!r}")
    dual = None
    if kind.dual_weight:
        dual = DualWeight.build(name, alpha, {key: settings.pop(key) for key in dual_settings if key in settings})
    return UnlearningLoss(name, kind, gamma, alpha, retain, settings, layer, dual)


def _check_settings(name: str, kind: LossKind, settings: Mapping[str, Any], dual_settings: list[str]) -> None:
    """Raise `SettingsError` for a setting that the loss does not have, or that should be a number."""
    parameters = signature(kind.term).parameters
    layer = ["layer"] if kind.reads_hidden or settings.get("retain") == "hidden" else []
    known = ["gamma", "alpha", "retain", *list(parameters)[2:], *layer, *dual_settings]
    for key in settings:
        if key not in known:
            raise SettingsError(f"loss {name!r} has no setting {key!r}, only {', '.join(known)}")
    defaults = {parameter.name: parameter.default for parameter in parameters.values()}
    defaults |= {f.name: f.default for f in fields(DualWeight)} | {"gamma": 1.0, "alpha": 0.0, "eps": 0.0}
    require_numbers(f"loss {name!r}", {key: value for key, value in settings.items() if is_number(defaults.get(key))})
