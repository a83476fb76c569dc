"""What an unlearning loss is: `gamma * forget term + alpha * retain term`, each a mean over labels or rows.

Shapes: L label positions, B rows, V classes or vocabulary entries.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_unlearn.errors import DataError, SettingsError
from hf_unlearn.predictions import Batch, Predictions, label_positions, predict

ForgetTerm = Callable[..., Tensor]
OriginalModel = Callable[[], AbstractContextManager]


@dataclass(frozen=True)
class LossKind:
    """A registered forget term.

    Attributes:
        term: `(predictions, original, **settings) -> values`, one value per label or per row; `original` holds the
            original model's predictions, or None where `needs_original` is false.
        unit: What a value stands for: `label` or `row`; the loss is the mean over these.
        needs_original: Whether the original model's predictions are read.
        needs_retain: Whether the loss makes no sense without retain rows.
        skip_first: Leave out each row's first label (sequences only).
        gamma, alpha: Default weights of the forget and the retain term.
    """

    term: ForgetTerm
    unit: Literal["label", "row"] = "label"
    needs_original: bool = False
    needs_retain: bool = False
    skip_first: bool = False
    gamma: float = 1.0
    alpha: float = 0.0


LOSSES: dict[str, LossKind] = {}


def register_loss(name: str, **traits: Any) -> Callable[[ForgetTerm], ForgetTerm]:
    """Register a forget term under `name`; `traits` are the fields of `LossKind`."""

    def register(term: ForgetTerm) -> ForgetTerm:
        LOSSES[name] = LossKind(term, **traits)
        return term

    return register


@dataclass(frozen=True)
class UnlearningLoss:
    """A loss with its settings. Batches are `{"forget": inputs}` or `{"forget": inputs, "retain": inputs}`."""

    name: str
    kind: LossKind
    gamma: float
    alpha: float
    retain: Literal["nll", "kl"] = "nll"
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def needs_original(self) -> bool:
        """Whether the original model's predictions are read."""
        return self.kind.needs_original or (self.retain == "kl" and self.alpha > 0)

    def counts(self, model: nn.Module, batch: Mapping[str, Batch]) -> dict[str, int]:
        """Number of units behind each term's mean, so that gradient accumulation weighs micro-batches rightly."""
        forget = batch["forget"]["labels"]
        labels = int(label_positions(model, forget, self.kind.skip_first).sum())
        counts = {"forget": len(forget) if self.kind.unit == "row" else labels}
        if self._uses_retain(batch):
            counts["retain"] = int(label_positions(model, batch["retain"]["labels"]).sum())
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
            original: Context manager in which `model` computes what the original model would.
            counts: Units of the whole optimizer step (all micro-batches and processes); default this batch's own.

        Raises:
            DataError: No labels, or the loss needs retain rows and the batch has none.
        """
        if self.kind.needs_retain and "retain" not in batch:
            raise DataError(
                f"loss {self.name!r} needs retain rows; pass retain_dataset, or choose a loss that does not"
            )
        counts = counts or self.counts(model, batch)
        skip = self.kind.skip_first
        reference = self._reference(model, batch["forget"], original, skip) if self.kind.needs_original else None
        predictions = predict(model, batch["forget"], skip)
        loss = self.gamma * self.kind.term(predictions, reference, **self.settings).sum() / max(counts["forget"], 1)
        if self._uses_retain(batch):
            loss = loss + self.alpha * self._retain_sum(model, batch["retain"], original) / max(counts["retain"], 1)
        return loss

    def _uses_retain(self, batch: Mapping[str, Batch]) -> bool:
        return "retain" in batch and self.alpha > 0

    def _reference(
        self, model: nn.Module, inputs: Batch, original: OriginalModel | None, skip_first: bool = False
    ) -> Predictions:
        if original is None:
            raise SettingsError(f"loss {self.name!r} reads the original model's predictions; pass `original`")
        training = model.training
        model.eval()
        try:
            with torch.no_grad(), original():
                return predict(model, inputs, skip_first)
        finally:
            model.train(training)

    def _retain_sum(self, model: nn.Module, inputs: Batch, original: OriginalModel | None) -> Tensor:
        reference = self._reference(model, inputs, original) if self.retain == "kl" else None
        predictions = predict(model, inputs)
        if reference is None:
            return predictions.nll_L.sum()
        log_p_LV, log_q_LV = (p.logits_LV.float().log_softmax(-1) for p in (reference, predictions))
        return F.kl_div(log_q_LV, log_p_LV, log_target=True, reduction="sum")


def build_loss(name: str, settings: Mapping[str, Any] | None = None) -> UnlearningLoss:
    """Loss by name, with `gamma`, `alpha`, `retain` ("nll" or "kl") and the term's own settings.

    Raises:
        SettingsError: Unknown loss or setting.
    """
    if name not in LOSSES:
        raise SettingsError(f"unknown loss {name!r}; choose from {', '.join(sorted(LOSSES))}")
    kind, given = LOSSES[name], dict(settings or {})
    own = list(signature(kind.term).parameters)[2:]
    for key in given:
        if key not in ("gamma", "alpha", "retain", *own):
            raise SettingsError(
                f"loss {name!r} has no setting {key!r}, only {', '.join(['gamma', 'alpha', 'retain', *own])}"
            )
    gamma, alpha = given.pop("gamma", kind.gamma), given.pop("alpha", kind.alpha)
    retain = given.pop("retain", "nll")
    if retain not in ("nll", "kl"):
        raise SettingsError(f"retain must be 'nll' or 'kl', got {retain!r}")
    return UnlearningLoss(name, kind, gamma, alpha, retain, given)
