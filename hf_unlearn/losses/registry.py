"""The losses by name: a forget term, what it needs, and the registry of all."""

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from torch import Tensor

from hf_unlearn.core.registry import Registry
from hf_unlearn.errors import SettingsError
from hf_unlearn.models.forward import Predictions

ForgetTerm = Callable[..., Tensor]
Predict = Callable[..., Predictions]
OriginalModel = Callable[[], AbstractContextManager[Predict | None]]
Content = Literal["nll", "logits", "hidden"]
RETAIN_TERMS = ("nll", "kl", "hidden")


@dataclass(frozen=True)
class LossKind:
    """A forget term and what it needs.

    Attributes:
        term: `(predictions, original, **settings) -> values`, one value per label or per row; `original` holds the
            original model's predictions, or None where `reads` is empty.
        unit: What a value stands for: `label` or `row`; the loss is the mean over these.
        labels: Rows that the loss makes sense for: with a `class` label, with `token` labels, or `any`.
        reads_original: What is read of the original model's predictions on forget rows: `nll`, `logits` or nothing.
        needs_retain: Whether the loss makes no sense without retain rows.
        alternate_answer: The alternate answer that each forget row needs: its own (`own`), one that says "I don't know"
            (`idk`); empty for losses without.
        reads_hidden: Whether the outputs of a layer are read (setting `layer`).
        dual_weight: Whether `alpha` is a dual weight (settings of `DualWeight`).
        skip_first: Leave out each row's first label (sequences only).
        gamma, alpha: Default weights of the forget and the retain term.
        retain: Default retain term: `nll`, `kl` (to the original model), or `hidden` (distance of the layer's outputs
            to the original model's).
    """

    term: ForgetTerm
    unit: Literal["label", "row"] = "label"
    labels: Literal["any", "class", "token"] = "any"
    reads_original: Literal["", "nll", "logits"] = ""
    needs_retain: bool = False
    alternate_answer: Literal["", "own", "idk"] = ""
    reads_hidden: bool = False
    dual_weight: bool = False
    skip_first: bool = False
    gamma: float = 1.0
    alpha: float = 0.0
    retain: Literal["nll", "kl", "hidden"] = "nll"


LOSSES: Registry[LossKind] = Registry("loss", "hf_unlearn.losses")


def register_loss(name: str, **traits: Any) -> Callable[[ForgetTerm], ForgetTerm]:
    """Register a forget term under `name`; `traits` are the fields of `LossKind`."""

    def register(term: ForgetTerm) -> ForgetTerm:
        LOSSES.add(name, LossKind(term, **traits))
        return term

    return register


def find_loss(loss: str | ForgetTerm) -> tuple[str, LossKind]:
    """Name and kind of a registered or custom loss."""
    if not isinstance(loss, str):
        name = getattr(loss, "__qualname__", type(loss).__name__)
        registered = (kind for kind in LOSSES.values() if kind.term is loss)
        return f"{getattr(loss, '__module__', '')}:{name}", next(registered, LossKind(loss))
    if loss in LOSSES or ":" not in loss:
        return loss, LOSSES.find(loss, also=("module:function",))
    module, _, function = loss.partition(":")
    here = os.getcwd()
    sys.path.insert(0, here)  # a console script looks only where it is installed
    try:
        term = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise SettingsError(f"cannot import loss {loss!r}: {error}") from error
    finally:
        sys.path.remove(here)
    if not callable(term):
        raise SettingsError(f"loss {loss!r} is no function of (predictions, original, **settings)")
    return loss, find_loss(term)[1]
