"""`UnlearningLoss`: `gamma * forget term + alpha * retain term`, each a mean over labels or rows.

Shapes: L label positions, B rows, V classes or vocabulary entries.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_unlearn.core.text import ShortRepr
from hf_unlearn.errors import DataError, SettingsError
from hf_unlearn.losses.dual_weight import DualWeight
from hf_unlearn.losses.registry import Content, LossKind, OriginalModel, Predict
from hf_unlearn.models.forward import Predictions, counted_labels, label_positions, predict
from hf_unlearn.models.modes import eval_mode
from hf_unlearn.models.tasks import Batch


@dataclass(frozen=True, repr=False)
class UnlearningLoss(ShortRepr):
    """A loss with its settings; made by `build_loss`.

    Batches are `{"forget": inputs}`, with `retain` inputs for a retain term, and with `alternate` inputs (the forget
    rows with another answer, in the same order) if `kind.alternate_answer` is set.

    >>> import torch
    >>> from hf_unlearn import build_loss
    >>> loss = build_loss("grad_ascent")
    >>> batch = {"pixel_values": torch.eye(3), "labels": torch.tensor([0, 1, 2])}
    >>> model = lambda pixel_values: torch.zeros(3, 4)  # uniform over four classes
    >>> round(loss(model, {"forget": batch}).item(), 3)  # -log 4
    -1.386
    >>> loss.needs_original, loss.has_retain_term
    (False, False)

    Attributes:
        name: Registered name, or `module:function`.
        kind: The forget term and what it needs.
        gamma: Weight of the forget term.
        alpha: Weight of the retain term.
        retain: The retain term: `nll`, `kl` or `hidden`.
        settings: Settings of the forget term.
        layer: Name or number of the layer whose outputs are read, if any.
        dual: The dual weight of the retain term, if the loss has one.
    """

    name: str
    kind: LossKind
    gamma: float
    alpha: float
    retain: Literal["nll", "kl", "hidden"] = "nll"
    settings: Mapping[str, object] = field(default_factory=dict)
    layer: int | str | None = None
    dual: DualWeight | None = None

    @property
    def needs_original(self) -> bool:
        """Whether the loss reads the original model's predictions."""
        return bool(self.original_contents)

    @property
    def original_contents(self) -> dict[str, Content]:
        """What the loss reads of the original model (`nll`, `logits` or `hidden` states), by part of the batch."""
        contents: dict[str, Content] = {}
        if self.kind.reads_original:
            contents["forget"] = self.kind.reads_original
            if self.kind.alternate_answer:
                contents["alternate"] = self.kind.reads_original
        if self.has_retain_term and self.retain != "nll":
            contents["retain"] = "logits" if self.retain == "kl" else "hidden"
        return contents

    @property
    def reference_contents(self) -> dict[str, Content]:
        """What the loss reads of the reference model, by part of the batch; empty if it needs no reference model."""
        return {"forget": self.kind.reads_reference} if self.kind.reads_reference else {}

    @property
    def has_retain_term(self) -> bool:
        """Whether the loss reads retain rows if there are any."""
        return self.alpha > 0 or self.dual is not None

    @property
    def rehearses(self) -> bool:
        """Whether the retain term holds the model to the original's predictions, so that any rows serve as its rows."""
        return self.has_retain_term and self.retain == "kl"

    @property
    def all_settings(self) -> dict[str, object]:
        """All settings, with which `build_loss` builds the same loss; for reports and restarts."""
        weights = {"gamma": self.gamma, "alpha": self.alpha, "retain": self.retain}
        layer = {} if self.layer is None else {"layer": self.layer}
        return weights | dict(self.settings) | layer | ({} if self.dual is None else self.dual.settings())

    def check_labels(self, *, tokens: bool) -> None:
        """Raise `DataError` if the loss is not defined for token labels, or not for class labels."""
        if self.kind.labels == "class" and tokens:
            raise DataError(
                f"loss {self.name!r} is for rows with a class label; for token labels use next_best or ce_u"
            )
        if self.kind.labels == "token" and not tokens:
            raise DataError(
                f"loss {self.name!r} compares answers of several tokens; for class labels use npo or next_best"
            )

    def counts(self, model: nn.Module, batch: Mapping[str, Batch]) -> dict[str, int]:
        """Return the number of labels or rows behind each term's mean, to weigh micro-batches in an optimizer step."""
        forget = _labels(model, batch["forget"])
        labels = int(label_positions(model, forget, self.kind.skip_first).sum())
        counts = {"forget": len(forget) if self.kind.unit == "row" else labels}
        if self._uses_retain(batch):
            counts["retain"] = int(label_positions(model, _labels(model, batch["retain"])).sum())
        return counts

    def __call__(
        self,
        model: nn.Module,
        batch: Mapping[str, Batch],
        original: OriginalModel | None = None,
        counts: Mapping[str, int] | None = None,
        reference: OriginalModel | None = None,
    ) -> Tensor:
        """Compute the scalar to minimise.

        Args:
            model: The model being unlearned.
            batch: Forget inputs and, for a retain term, retain inputs, each with `labels`.
            original: Returns a context manager. In it either `model` computes what the original model would, or it
                yields a function `(model, inputs, skip_first, layer) -> Predictions` that gives the original model's
                predictions.
            counts: Number of labels or rows of the complete optimizer step (all micro-batches and processes) by term;
                default: those of this batch.
            reference: The same as `original`, for the predictions of the reference model.

        Raises:
            DataError: The batch has no labels, labels that the loss is not defined for, or lacks retain rows or
                alternate answers that the loss needs.
            SettingsError: The forget term does not return one value per label or row, or `original` or `reference` is
                missing.
        """
        self._check(batch)
        counts = counts or self.counts(model, batch)
        compared = None
        if self.kind.reads_original or self.kind.reads_reference:
            source, what = (original, "original") if self.kind.reads_original else (reference, "reference")
            with self._frozen(model, source, what) as predict_frozen:
                compared = self._forget_predictions(predict_frozen, model, batch)
        predictions = self._forget_predictions(predict, model, batch)
        values = self.kind.term(predictions, compared, **self.settings)
        expected = predictions.n_rows if self.kind.unit == "row" else len(predictions.labels_L)
        if not isinstance(values, Tensor) or values.shape != (expected,):
            raise SettingsError(
                f"loss {self.name!r} must return one value per {self.kind.unit} ({expected} here), "
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
        if self.kind.alternate_answer and "alternate" not in batch:
            raise DataError(f"loss {self.name!r} needs an alternate answer for each forget row: a column 'alternate'")
        self.check_labels(tokens=_labels(None, batch["forget"]).ndim > 1)

    def _uses_retain(self, batch: Mapping[str, Batch]) -> bool:
        return "retain" in batch and self.has_retain_term

    def _forget_predictions(self, predictor: Predict, model: nn.Module, batch: Mapping[str, Batch]) -> Predictions:
        layer = self.layer if self.kind.reads_hidden else None
        forget = predictor(model, batch["forget"], self.kind.skip_first, layer)
        if not self.kind.alternate_answer:
            return forget
        alternate = predictor(model, batch["alternate"], self.kind.skip_first, None)
        if alternate.n_rows != forget.n_rows:
            raise DataError(f"{forget.n_rows} forget rows have {alternate.n_rows} alternate answers; give one for each")
        return replace(forget, alternate=alternate)

    @contextmanager
    def _frozen(self, model: nn.Module, source: OriginalModel | None, what: str) -> Iterator[Predict]:
        """Yield a function that predicts as the original or the reference model, in eval mode, without gradients."""
        if source is None:
            raise SettingsError(f"loss {self.name!r} reads the {what} model's predictions; pass `{what}`")
        with eval_mode(model), torch.no_grad(), source() as predict_frozen:
            yield predict_frozen or predict

    def _retain_sum(self, model: nn.Module, inputs: Batch, original: OriginalModel | None) -> Tensor:
        layer = self.layer if self.retain == "hidden" else None
        if self.retain == "nll":
            return predict(model, inputs).nll_L.sum()
        with self._frozen(model, original, "original") as predict_original:
            reference = predict_original(model, inputs, False, layer)
        predictions = predict(model, inputs, False, layer)
        if predictions.hidden is not None:
            assert reference.hidden is not None
            return predictions.hidden.distance(reference.hidden).sum()
        log_p_LV, log_q_LV = (p.logits_LV.float().log_softmax(-1) for p in (reference, predictions))
        return F.kl_div(log_q_LV, log_p_LV, log_target=True, reduction="sum")


def _labels(model: nn.Module | None, inputs: Batch) -> Tensor:
    """Return the labels of a batch; with a model, those that count."""
    if "labels" not in inputs:
        raise DataError(f"the batch has no column 'labels', only {sorted(inputs)}; a label is what is forgotten")
    return inputs["labels"] if model is None else counted_labels(model, inputs)
