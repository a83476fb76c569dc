"""What an unlearning loss is: `gamma * forget term + alpha * retain term`, each a mean over labels or rows.

Shapes: L label positions, B rows, V classes or vocabulary entries.
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields, replace
from importlib import import_module
from inspect import signature
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_unlearn.core.registry import Registry
from hf_unlearn.core.settings import is_number, require_numbers
from hf_unlearn.errors import DataError, SettingsError
from hf_unlearn.losses.dual_weight import DualWeight
from hf_unlearn.models.forward import Predictions, label_positions, predict
from hf_unlearn.models.modes import eval_mode
from hf_unlearn.models.tasks import Batch

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
        reads: What is read of the original model's predictions on forget rows: `nll`, `logits` or nothing.
        needs_retain: Whether the loss makes no sense without retain rows.
        alternates: Whether each forget row needs an alternate answer: its own (`own`), or one that says "I don't know"
            (`idk`); empty for losses without.
        hidden: Whether the outputs of a layer are read (setting `layer`).
        dual: Whether `alpha` is a dual weight (settings of `DualWeight`).
        skip_first: Leave out each row's first label (sequences only).
        gamma, alpha: Default weights of the forget and the retain term.
        retain: Default retain term: `nll`, `kl` (to the original model), or `hidden` (distance of the layer's outputs
            to the original model's).
    """

    term: ForgetTerm
    unit: Literal["label", "row"] = "label"
    labels: Literal["any", "class", "token"] = "any"
    reads: Literal["", "nll", "logits"] = ""
    needs_retain: bool = False
    alternates: Literal["", "own", "idk"] = ""
    hidden: bool = False
    dual: bool = False
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


@dataclass(frozen=True)
class UnlearningLoss:
    """A loss with its settings.

    Batches are `{"forget": inputs}`, with `retain` inputs for a retain term and `alternate` inputs (row by row those
    of `forget` with another answer) where `kind.alternates` says so.
    """

    name: str
    kind: LossKind
    gamma: float
    alpha: float
    retain: Literal["nll", "kl", "hidden"] = "nll"
    settings: Mapping[str, Any] = field(default_factory=dict)
    layer: int | str | None = None
    dual: DualWeight | None = None

    @property
    def needs_original(self) -> bool:
        """Whether the original model's predictions are read."""
        return bool(self.original_contents)

    @property
    def original_contents(self) -> dict[str, Content]:
        """What is read of the original model, by part of the batch: its `nll`, `logits` or `hidden` states."""
        contents: dict[str, Content] = {}
        if self.kind.reads:
            contents["forget"] = self.kind.reads
            if self.kind.alternates:
                contents["alternate"] = self.kind.reads
        if self.has_retain_term and self.retain != "nll":
            contents["retain"] = "logits" if self.retain == "kl" else "hidden"
        return contents

    @property
    def has_retain_term(self) -> bool:
        """Whether retain rows are read, if there are any."""
        return self.alpha > 0 or self.dual is not None

    @property
    def all_settings(self) -> dict[str, Any]:
        """Everything it was built with, for reports and restarts."""
        own = dict(self.settings) | ({} if self.layer is None else {"layer": self.layer})
        weights = {"gamma": self.gamma, "alpha": self.alpha, "retain": self.retain}
        return weights | own | ({} if self.dual is None else self.dual.settings())

    def check_labels(self, *, tokens: bool) -> None:
        """Raise `DataError` where the loss is not for labels of this kind: of tokens, or of classes."""
        if self.kind.labels == "class" and tokens:
            raise DataError(
                f"loss {self.name!r} is for rows with a class label; for token labels use next_best or ce_u"
            )
        if self.kind.labels == "token" and not tokens:
            raise DataError(
                f"loss {self.name!r} compares answers of several tokens; for class labels use npo or next_best"
            )

    def counts(self, model: nn.Module, batch: Mapping[str, Batch]) -> dict[str, int]:
        """Number of units behind each term's mean, so that gradient accumulation weighs micro-batches rightly."""
        forget = _labels(batch["forget"])
        labels = int(label_positions(model, forget, self.kind.skip_first).sum())
        counts = {"forget": len(forget) if self.kind.unit == "row" else labels}
        if self._uses_retain(batch):
            counts["retain"] = int(label_positions(model, _labels(batch["retain"])).sum())
        return counts

    def __call__(
        self,
        model: nn.Module,
        batch: Mapping[str, Batch],
        original: OriginalModel | None = None,
        counts: Mapping[str, int] | None = None,
    ) -> Tensor:
        """The scalar to minimise.

        Args:
            model: The model being unlearned.
            batch: Forget inputs and, for a retain term, retain inputs, each with `labels`.
            original: Context manager in which `model` computes what the original model would, or that gives a
                function `(model, inputs, skip_first, layer) -> Predictions` which knows the original model's.
            counts: Units of the whole optimizer step (all micro-batches and processes); default this batch's own.

        Raises:
            DataError: No labels, labels of a kind that the loss is not for, or retain rows or alternate answers that
                the loss needs and the batch has not.
            SettingsError: A custom term that does not give one value per unit.
        """
        self._check(batch)
        counts = counts or self.counts(model, batch)
        reference = None
        if self.kind.reads:
            with self._original(model, original) as how:
                reference = self._forget_predictions(how, model, batch)
        predictions = self._forget_predictions(predict, model, batch)
        values = self.kind.term(predictions, reference, **self.settings)
        expected = predictions.n_rows if self.kind.unit == "row" else len(predictions.labels_L)
        if not isinstance(values, Tensor) or values.shape != (expected,):
            raise SettingsError(
                f"loss {self.name!r} must give one value per {self.kind.unit} ({expected} here), "
                f"got {list(values.shape) if isinstance(values, Tensor) else type(values).__name__}"
            )
        loss = self.gamma * values.sum() / max(counts["forget"], 1)
        if self._uses_retain(batch):
            retain = self._retain_sum(model, batch["retain"], original) / max(counts["retain"], 1)
            if self.dual is not None:
                self.dual.add(retain.detach())
            loss = loss + (self.alpha if self.dual is None else self.dual.value) * retain
        return loss

    def _check(self, batch: Mapping[str, Batch]) -> None:
        if self.kind.needs_retain and "retain" not in batch:
            raise DataError(
                f"loss {self.name!r} needs retain rows; pass retain_dataset, or choose a loss that does not"
            )
        if self.kind.alternates and "alternate" not in batch:
            raise DataError(f"loss {self.name!r} needs an alternate answer for each forget row: a column 'alternate'")
        self.check_labels(tokens=_labels(batch["forget"]).ndim > 1)

    def _uses_retain(self, batch: Mapping[str, Batch]) -> bool:
        return "retain" in batch and self.has_retain_term

    def _forget_predictions(self, how: Predict, model: nn.Module, batch: Mapping[str, Batch]) -> Predictions:
        layer = self.layer if self.kind.hidden else None
        found = how(model, batch["forget"], self.kind.skip_first, layer)
        if not self.kind.alternates:
            return found
        alternate = how(model, batch["alternate"], self.kind.skip_first, None)
        if alternate.n_rows != found.n_rows:
            raise DataError(f"{found.n_rows} forget rows have {alternate.n_rows} alternate answers; give one for each")
        return replace(found, alternate=alternate)

    @contextmanager
    def _original(self, model: nn.Module, original: OriginalModel | None) -> Iterator[Predict]:
        """How to predict as the original model does, in eval mode and without gradients."""
        if original is None:
            raise SettingsError(f"loss {self.name!r} reads the original model's predictions; pass `original`")
        with eval_mode(model), torch.no_grad(), original() as how:
            yield how or predict

    def _retain_sum(self, model: nn.Module, inputs: Batch, original: OriginalModel | None) -> Tensor:
        layer = self.layer if self.retain == "hidden" else None
        if self.retain == "nll":
            return predict(model, inputs).nll_L.sum()
        with self._original(model, original) as how:
            reference = how(model, inputs, False, layer)
        predictions = predict(model, inputs, False, layer)
        if predictions.hidden is not None:
            assert reference.hidden is not None
            return predictions.hidden.distance(reference.hidden).sum()
        log_p_LV, log_q_LV = (p.logits_LV.float().log_softmax(-1) for p in (reference, predictions))
        return F.kl_div(log_q_LV, log_p_LV, log_target=True, reduction="sum")


def _labels(inputs: Batch) -> Tensor:
    if "labels" not in inputs:
        raise DataError(f"the batch has no column 'labels', only {sorted(inputs)}; a label is what is forgotten")
    return inputs["labels"]


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
    name, kind = _find(loss)
    given = dict(settings or {})
    own = [
        *list(signature(kind.term).parameters)[2:],
        *(["layer"] if kind.hidden or given.get("retain") == "hidden" else []),
    ]
    dual_settings = [f.name for f in fields(DualWeight) if f.init and f.name != "value"] if kind.dual else []
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
    dual = DualWeight.build(name, alpha, {k: given.pop(k) for k in dual_settings if k in given}) if kind.dual else None
    return UnlearningLoss(name, kind, gamma, alpha, retain, given, layer, dual)


def _find(loss: str | ForgetTerm) -> tuple[str, LossKind]:
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
    return loss, _find(term)[1]
