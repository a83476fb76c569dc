"""A loss from its name and settings."""

from collections.abc import Mapping
from dataclasses import fields
from inspect import signature
from typing import Any

from hf_unlearn.core.settings import is_number, require_numbers
from hf_unlearn.errors import SettingsError
from hf_unlearn.losses.base import UnlearningLoss
from hf_unlearn.losses.dual_weight import DualWeight
from hf_unlearn.losses.registry import RETAIN_TERMS, ForgetTerm, find_loss


def build_loss(loss: str | ForgetTerm | UnlearningLoss, settings: Mapping[str, Any] | None = None) -> UnlearningLoss:
    """Loss by name, with `gamma`, `alpha`, `retain` ("nll", "kl" or "hidden") and the term's own settings.

    Args:
        loss: A registered name, `module:function` of a forget term (see `LossKind.term`; the module is looked for in
            the working folder too), or the term itself. A term without `register_loss` gives one value per label and
            reads no original model.
        settings: The settings; those of the term are its arguments after the first two.

    Raises:
        SettingsError: Unknown loss or setting, or a value that is no number where the default is one.
    """
    if isinstance(loss, UnlearningLoss):
        return loss
    name, kind = find_loss(loss)
    given = dict(settings or {})
    own = [
        *list(signature(kind.term).parameters)[2:],
        *(["layer"] if kind.reads_hidden or given.get("retain") == "hidden" else []),
    ]
    dual_settings = [f.name for f in fields(DualWeight) if f.init and f.name != "value"] if kind.dual_weight else []
    known = ["gamma", "alpha", "retain", *own, *dual_settings]
    for key in given:
        if key not in known:
            raise SettingsError(f"loss {name!r} has no setting {key!r}, only {', '.join(known)}")
    defaults = {p.name: p.default for p in signature(kind.term).parameters.values()}
    defaults |= {f.name: f.default for f in fields(DualWeight)} | {"gamma": 1.0, "alpha": 0.0, "eps": 0.0}
    require_numbers(f"loss {name!r}", {key: value for key, value in given.items() if is_number(defaults.get(key))})
    gamma, alpha = given.pop("gamma", kind.gamma), given.pop("alpha", kind.alpha)
    retain, layer = given.pop("retain", kind.retain), given.pop("layer", 7 if "layer" in own else None)
    if retain not in RETAIN_TERMS:
        raise SettingsError(f"retain must be 'nll', 'kl' or 'hidden', got {retain!r}")
    dual = (
        DualWeight.build(name, alpha, {k: given.pop(k) for k in dual_settings if k in given})
        if kind.dual_weight
        else None
    )
    return UnlearningLoss(name, kind, gamma, alpha, retain, given, layer, dual)
