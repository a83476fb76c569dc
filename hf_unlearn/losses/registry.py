"""The forget losses by name: a forget term, and what it needs."""

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
    """A forget term and what it needs; the fields after `term` are the traits of `register_loss`.

    Attributes:
        term: `(predictions, original, **settings) -> values`, one value per label or per row. `original` holds the
            predictions of the original model (`reads_original`) or of the reference model (`reads_reference`), or None
            if both are empty. The settings are keywords with defaults.
        unit: What each value belongs to: a `label` or a `row`. The loss is the mean over these.
        labels: The labels that the loss is defined for: one `class` per row, a sequence of `token` labels, or `any`.
        reads_original: What the term reads of the original model's predictions on forget rows: `nll`, `logits`, or
            nothing (empty).
        reads_reference: The same of the reference model, which has not learnt the forget rows. A loss reads one of the
            two.
        needs_retain: Whether the loss requires retain rows.
        alternate_answer: The alternate answer that each forget row needs: its own (`own`), one that says "I don't
            know" (`idk`), or none (empty).
        reads_hidden: Whether the term reads the outputs of a layer, which the setting `layer` names.
        dual_weight: Whether the retain term has a dual weight, which starts at `alpha` (see `DualWeight`).
        skip_first: Whether the first label of each answer of at least three is left out (`forward.label_positions`).
        gamma: Default weight of the forget term.
        alpha: Default weight of the retain term.
        retain: Default retain term: `nll`, `kl` (divergence from the original model), or `hidden` (distance of the
            layer's outputs to the original model's).
    """

    term: ForgetTerm
    unit: Literal["label", "row"] = "label"
    labels: Literal["any", "class", "token"] = "any"
    reads_original: Literal["", "nll", "logits"] = ""
    reads_reference: Literal["", "nll", "logits"] = ""
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
    """Function decorator: make a forget term available under `name` in settings, commands, estimates and grids.

    Example, minimising the probability of each label itself:

    >>> import torch
    >>> from hf_unlearn import build_loss, register_loss
    >>> @register_loss("probability", alpha=1.0)
    ... def probability(predictions, original, *, weight: float = 1.0):
    ...     return weight * (-predictions.nll_L).exp()
    >>> loss = build_loss("probability", {"weight": 2.0})
    >>> batch = {"pixel_values": torch.eye(3), "labels": torch.tensor([0, 1, 2])}
    >>> model = lambda pixel_values: torch.zeros(3, 4)  # uniform over four classes
    >>> loss(model, {"forget": batch}).item()
    0.5
    >>> LOSSES.remove("probability")

    Args:
        name: Name of the loss. One function may be registered under several names with different traits.
        traits: The fields of `LossKind` other than `term`.

    Raises:
        SettingsError: Another loss has this name.
    """

    def register(term: ForgetTerm) -> ForgetTerm:
        LOSSES.add(name, LossKind(term, **traits))
        return term

    return register


def find_loss(loss: str | ForgetTerm) -> tuple[str, LossKind]:
    """Return the name and kind of a loss that is given by name, as `module:function`, or as a function.

    The working folder is searched for the module too. A function that is not registered gets the default `LossKind`.

    Raises:
        SettingsError: No such loss, module or function, or what was imported is not callable.
    """
    if not isinstance(loss, str):
        name = getattr(loss, "__qualname__", type(loss).__name__)
        registered = (kind for kind in LOSSES.values() if kind.term is loss)
        return f"{getattr(loss, '__module__', '')}:{name}", next(registered, LossKind(loss))
    if loss in LOSSES or ":" not in loss:
        return loss, LOSSES.find(loss, also=("module:function",))
    module, _, function = loss.partition(":")
    working_folder = os.getcwd()
    sys.path.insert(0, working_folder)  # a console script searches only its own folder
    try:
        term = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise SettingsError(f"cannot import loss {loss!r}: {error}") from error
    finally:
        sys.path.remove(working_folder)
    if not callable(term):
        raise SettingsError(f"loss {loss!r} is not a function of (predictions, original, **settings)")
    return loss, find_loss(term)[1]
