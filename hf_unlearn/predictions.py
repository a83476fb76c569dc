"""What a model predicts where it has a label: the one place that knows about shifted labels and masks.

Shapes: B rows, T positions, V classes or vocabulary entries, L label positions of the batch (one a row for
classification; the positions whose label is not -100 for language models).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_unlearn.adapters import without_wrapper
from hf_unlearn.errors import DataError, ModelError

IGNORED = -100
DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")
Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Predictions:
    """Logits and true labels at the label positions of one batch."""

    logits_LV: Tensor
    labels_L: Tensor
    rows_L: Tensor
    n_rows: int

    @property
    def nll_L(self) -> Tensor:
        """Negative log-likelihood of each true label, in nats."""
        return F.cross_entropy(self.logits_LV.float(), self.labels_L, reduction="none")

    def sum_by_row(self, values_L: Tensor) -> Tensor:
        """Sum values over each row's label positions: `[L] -> [B]`."""
        return values_L.new_zeros(self.n_rows).index_add(0, self.rows_L, values_L)

    @property
    def lengths_B(self) -> Tensor:
        """Number of label positions of each row."""
        return torch.bincount(self.rows_L, minlength=self.n_rows)

    def select(self, keep_L: Tensor) -> "Predictions":
        """The same, at the positions where the boolean `keep_L` is true."""
        return Predictions(self.logits_LV[keep_L], self.labels_L[keep_L], self.rows_L[keep_L], self.n_rows)


def shifts_labels(model: nn.Module) -> bool:
    """Whether the label of position t is predicted at position t - 1 (decoder-only language models).

    transformers derives `loss_type` from the class name and falls back to the causal loss where the name says
    nothing (`GPT2LMHeadModel`), as it does for decoders that also see images (`...ForConditionalGeneration`); the
    same rule is used here. Sequence outputs alone are ever shifted.
    """
    model = getattr(model, "module", model)
    config = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return False
    return getattr(model, "loss_type", None) in (None, "ForCausalLM", "ForConditionalGeneration")


def label_positions(model: nn.Module, labels: Tensor, skip_first: bool = False) -> Tensor:
    """Boolean mask of the label positions that a loss reads: `[B]` or `[B, T - 1]` (shifted) or `[B, T]`.

    `skip_first` leaves out each row's first label position, for sequence labels only.
    """
    if labels.ndim == 1:
        return labels != IGNORED
    mask_BT = (labels[:, 1:] if shifts_labels(model) else labels) != IGNORED
    if skip_first:
        mask_BT = mask_BT & (mask_BT.cumsum(1) > 1)
    return mask_BT


def _without_labels(model: nn.Module, inputs: Batch) -> dict[str, Tensor]:
    """The inputs alone; an encoder-decoder gets the decoder inputs that it would itself make of the labels."""
    rest = {key: value for key, value in inputs.items() if key != "labels"}
    decoder_inputs = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if decoder_inputs is not None and "labels" in inputs and not rest.keys() & set(DECODER_INPUTS):
        rest["decoder_input_ids"] = decoder_inputs(labels=inputs["labels"])
    return rest


def output_logits(model: nn.Module, inputs: Batch, **forward_options: Any) -> Tensor:
    """Forward pass without labels; returns the logits, `[B, V]` or `[B, T, V]`."""
    outputs: Any = model(**_without_labels(model, inputs), **forward_options)
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if logits is None:
        raise ModelError(f"{type(model).__name__} returns no logits; use a model with a head (AutoModelFor...)")
    return logits


def _can_keep_logits(model: nn.Module) -> bool:
    """Whether the model computes the logits of a batch's last positions alone when asked to."""
    model = getattr(model, "module", model)
    return "logits_to_keep" in signature(without_wrapper(model).forward).parameters  # a wrapper's hides the names


def predict(model: nn.Module, inputs: Batch, skip_first: bool = False) -> Predictions:
    """Run `model` on a batch and return its predictions at the label positions.

    Raises:
        DataError: The batch has no `labels`, or every one of them is -100.
        ModelError: The model returns no logits.
    """
    labels = inputs.get("labels")
    if labels is None:
        raise DataError(f"the batch has no column 'labels', only {sorted(inputs)}; a label is what is forgotten")
    mask = label_positions(model, labels, skip_first)
    if not mask.any():
        raise DataError(f"every label of a batch of {len(labels)} rows is -100 (masked); nothing is left to predict")
    if labels.ndim == 2 and shifts_labels(model):
        first = int(mask.any(0).nonzero()[0])  # the prompt's logits would be a large part of the work of a pass
        options = {"logits_to_keep": mask.shape[1] + 1 - first} if _can_keep_logits(model) else {}
        logits = output_logits(model, inputs, **options)
        logits, labels, mask = logits[:, -1 - mask.shape[1] + first : -1], labels[:, 1 + first :], mask[:, first:]
    else:
        logits = output_logits(model, inputs)
    return Predictions(logits[mask], labels[mask], mask.nonzero()[:, 0], len(labels))
