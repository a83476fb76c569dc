"""Forward passes and what they predict at the labels: the only module that knows about shifted labels and masks.

Shapes: B rows, T positions, V classes or vocabulary entries, L label positions of the batch (one per row for
classification; the positions whose label is not -100 for language models), P positions behind one label (1 for
language models, all positions of the row for classification), D features of a hidden state.
"""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_unlearn.core.text import ShortRepr
from hf_unlearn.errors import DataError, ModelError, SettingsError
from hf_unlearn.models.adapters import base_name, without_wrapper
from hf_unlearn.models.arguments import taken_inputs
from hf_unlearn.models.padding import has_values, own_padding
from hf_unlearn.models.tasks import (
    CONTENT_MASK,
    DECODER_INPUTS,
    IGNORED,
    Batch,
    context_length,
    has_decoder,
    resize_remedy,
    shifts_labels,
    vocabulary_size,
)


@dataclass(frozen=True, repr=False)
class Hidden(ShortRepr):
    """A module's outputs behind each label.

    Attributes:
        states_LPD: The outputs.
        mask_LP: Which positions count.
    """

    states_LPD: Tensor
    mask_LP: Tensor

    def distance(self, target: "Tensor | Hidden") -> Tensor:
        """Return the mean squared difference to other states or a vector `[D]`, over features and positions: `[L]`."""
        other = target.states_LPD if isinstance(target, Hidden) else target
        squares_LP = (self.states_LPD.float() - other.float()).square().mean(-1)
        return (squares_LP * self.mask_LP).sum(1) / self.mask_LP.sum(1).clamp(min=1)


@dataclass(frozen=True, repr=False)
class Predictions(ShortRepr):
    """Logits and true labels at the label positions of one batch.

    >>> predictions = Predictions(torch.zeros(3, 2), torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), n_rows=2)
    >>> predictions.sum_by_row(predictions.nll_L)
    tensor([1.3863, 0.6931])
    >>> predictions.lengths_B
    tensor([2, 1])

    Attributes:
        logits_LV: Logits, or log-probabilities; without columns if only `known_nll_L` is known.
        labels_L: True labels.
        rows_L: The row of the batch that each label belongs to.
        n_rows: Number of rows of the batch.
        hidden: Outputs of a module, if `predict` was asked for them.
        alternate: Predictions of the rows' alternate answers, for losses that compare with them.
        inputs: The batch, for losses that depend on the content of a row.
        known_nll_L: `nll_L`, if it was stored in place of the logits.
        content_L: Which labels are content (true) and which are not, if the rows have a column `content_mask`.
    """

    logits_LV: Tensor
    labels_L: Tensor
    rows_L: Tensor
    n_rows: int
    hidden: Hidden | None = None
    alternate: "Predictions | None" = None
    inputs: Batch | None = None
    known_nll_L: Tensor | None = None
    content_L: Tensor | None = None

    @property
    def nll_L(self) -> Tensor:
        """The negative log-likelihood of each true label, in nats."""
        if self.known_nll_L is not None:
            return self.known_nll_L
        return F.cross_entropy(self.logits_LV.float(), self.labels_L, reduction="none")

    def sum_by_row(self, values_L: Tensor) -> Tensor:
        """Sum values over each row's label positions: `[L] -> [B]`."""
        return values_L.new_zeros(self.n_rows).index_add(0, self.rows_L, values_L)

    @property
    def lengths_B(self) -> Tensor:
        """The number of label positions of each row."""
        return torch.bincount(self.rows_L, minlength=self.n_rows)


def counted_labels(model: nn.Module, inputs: Batch) -> Tensor:
    """Return the labels of a batch with -100 where padding is, or where the label would be predicted from padding.

    Padding is where the attention mask is 0 or, for the labels of an encoder-decoder, where the decoder's own mask is
    0. So a row has the same labels whatever it is padded with, and on which side.

    >>> padded = {"labels": torch.tensor([[5, 6, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    >>> counted_labels(nn.Linear(2, 2), padded)
    tensor([[   5,    6, -100]])
    """
    labels = inputs["labels"]
    mask_BT = inputs.get("decoder_attention_mask" if has_decoder(model) else "attention_mask")
    if mask_BT is None or labels.ndim != 2 or mask_BT.shape != labels.shape:
        return labels
    seen_BT = mask_BT.bool()
    if shifts_labels(model):
        seen_BT = seen_BT & F.pad(seen_BT[:, :-1], (1, 0), value=True)
    return labels.masked_fill(~seen_BT, IGNORED)


def label_positions(model: nn.Module, labels: Tensor, skip_first: bool = False) -> Tensor:
    """Return a mask of the label positions that a loss reads: `[B]`, `[B, T - 1]` (shifted) or `[B, T]`.

    `labels` are those of `counted_labels`. `skip_first` leaves out the first label of each answer of at least three
    labels, for models that write answers only: one of a single token and an end token would lose all that it says.
    """
    if labels.ndim == 1:
        return labels != IGNORED
    mask_BT = (labels[:, 1:] if shifts_labels(model) else labels) != IGNORED
    if skip_first and writes_answers(model):
        before_BT = F.pad(mask_BT[:, :-1], (1, 0), value=False)
        next_BT, third_BT = (F.pad(mask_BT, (0, n), value=False)[:, n:] for n in (1, 2))  # rows may be shorter
        mask_BT = mask_BT & (before_BT | ~next_BT | ~third_BT)
    return mask_BT


def label_places(model: nn.Module, row: Mapping[str, Any]) -> list[int]:
    """Return the places of a row's labels `[T]`, the tokens of an answer, that the model predicts."""
    inputs = {key: torch.as_tensor(row[key])[None] for key in ("attention_mask",) if row.get(key) is not None}
    inputs["labels"] = torch.as_tensor(row["labels"])[None]
    places = label_positions(model, counted_labels(model, inputs))[0].nonzero()[:, 0]
    return (places + shifts_labels(model)).tolist()


def writes_answers(model: nn.Module) -> bool:
    """Return whether the labels of a row are the tokens of an answer; those of a token classifier are not."""
    return shifts_labels(model) or has_decoder(model)


def _without_labels(model: nn.Module, inputs: Batch) -> dict[str, Tensor]:
    """Return the inputs without labels; an encoder-decoder gets the decoder inputs that it would make of the labels."""
    rest = {key: value for key, value in inputs.items() if key != "labels"}
    decoder_inputs = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    has_answer = "labels" in inputs and inputs["labels"].ndim == 2  # the decoder of a classifier reads the input
    if decoder_inputs is not None and has_answer and not rest.keys() & set(DECODER_INPUTS):
        rest["decoder_input_ids"] = decoder_inputs(labels=inputs["labels"])
    return rest


def decoder_mask(inputs: Batch) -> Tensor | None:
    """Return which positions of the decoder count in an encoder-decoder, or None if the batch does not say.

    These are the positions of its own mask, or those up to the last label of each row. The decoder of a classifier
    reads the input, so its positions are those of the input's mask.
    """
    if "decoder_attention_mask" in inputs:
        return inputs["decoder_attention_mask"].bool()
    if "labels" not in inputs:
        return None
    if inputs["labels"].ndim != 2:
        return inputs["attention_mask"].bool() if "attention_mask" in inputs else None
    return (inputs["labels"] != IGNORED).flip(1).cumsum(1).flip(1) > 0


def _check_channels(model: nn.Module, inputs: Batch) -> None:
    pixels = inputs.get("pixel_values")
    channels = getattr(getattr(getattr(model, "module", model), "config", None), "num_channels", None)
    if pixels is not None and pixels.ndim == 4 and isinstance(channels, int) and pixels.shape[1] != channels:
        raise DataError(
            f"the images have {pixels.shape[1]} channels (pixel_values {list(pixels.shape)}, channels first), the "
            f"model takes {channels}; use the model's own image processor"
        )


def output_logits(model: nn.Module, inputs: Batch, **forward_options: int) -> Tensor:
    """Run a forward pass without labels and return the logits, `[B, V]` or `[B, T, V]`.

    Columns that the model does not take are left out (`arguments.taken_inputs`). Padded positions get the padding id of
    the model's configuration, because some models look for it: classifiers on decoders read the last position that does
    not have it.

    Raises:
        DataError: A row is longer than the model's context, has a token that the model has no embedding for, or images
            do not have the model's number of channels.
        ModelError: The model returns no logits.
    """
    inputs = taken_inputs(model, inputs)
    decoder_reads = ("labels", "decoder_input_ids") if has_decoder(model) else ()
    read = [inputs[name] for name in ("input_ids", *decoder_reads) if name in inputs and inputs[name].ndim == 2]
    length, context = max((tokens_BT.shape[1] for tokens_BT in read), default=0), context_length(model)
    if context is not None and length > context:
        raise DataError(
            f"a row has {length} tokens, the model's context is {context}; lower max_length, or cut the row"
        )
    _check_channels(model, inputs)
    with own_padding(model, inputs) as padded:
        _check_ids(model, padded)
        outputs = model(**_without_labels(model, padded), **forward_options)
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if logits is None:
        raise ModelError(f"{type(model).__name__} returns no logits; use a model with a head (AutoModelFor...)")
    return logits


def _check_ids(model: nn.Module, inputs: Batch) -> None:
    """Raise `DataError` if an embedding of the model does not have a row for an id: an index error says too little."""
    if not all(map(has_values, inputs.values())):
        return
    config = getattr(getattr(model, "module", model), "config", None)
    rows = vocabulary_size(model)
    decoder_reads = "labels" if has_decoder(model) else "decoder_input_ids"
    for name in ("input_ids", "decoder_input_ids", decoder_reads):
        if rows is not None and name in inputs and inputs[name].ndim == 2 and inputs[name].numel():
            ids = inputs[name]
            low, high = ids[ids != IGNORED].aminmax() if name == "labels" and (ids != IGNORED).any() else ids.aminmax()
            if (name != "labels" and low < 0) or high >= rows:
                raise DataError(f"a row has the token id {int(low if low < 0 else high)}; {resize_remedy(rows)}")
    types = getattr(config, "type_vocab_size", None)
    if types and "token_type_ids" in inputs and (highest := int(inputs["token_type_ids"].max())) >= types:
        raise DataError(
            f"a row has the token type {highest}, the model has types 0 to {types - 1}; use the model's own tokenizer, "
            "or leave out the column token_type_ids"
        )


def _can_keep_logits(model: nn.Module) -> bool:
    """Return whether the model can compute the logits of only the last positions of a batch."""
    model = getattr(model, "module", model)
    return "logits_to_keep" in signature(without_wrapper(model).forward).parameters  # a wrapper hides the names


def predict(model: nn.Module, inputs: Batch, skip_first: bool = False, layer: int | str | None = None) -> Predictions:
    """Run `model` on a batch and return its predictions at the label positions.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(
    ...     vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    ... )
    >>> batch = {"input_ids": torch.tensor([[5, 6, 7]]), "labels": torch.tensor([[-100, 6, 7]])}
    >>> predictions = predict(LlamaForCausalLM(config), batch)
    >>> predictions.logits_LV.shape, predictions.labels_L
    (torch.Size([2, 64]), tensor([6, 7]))

    Args:
        model: A model with logits.
        inputs: The batch, with `labels` `[B]` or `[B, T]`.
        skip_first: Leave out the first label of each longer answer (`label_positions`).
        layer: Also return the outputs of this module (`find_module`).

    Raises:
        DataError: The batch has no `labels`, all labels are -100, one is not a class of the model, a row is longer than
            the context, or `content_mask` has another shape than the labels.
        ModelError: The model returns no logits, or not one distribution per label.
        SettingsError: The model has no such layer.
    """
    content, inputs = inputs.get(CONTENT_MASK), taken_inputs(model, inputs)
    labels = inputs.get("labels")
    if labels is None:
        raise DataError(f"the batch has no column 'labels', only {sorted(inputs)}; a label is what is forgotten")
    labels = counted_labels(model, inputs)
    mask = label_positions(model, labels, skip_first)
    if not mask.any():
        raise DataError(f"every label of a batch of {len(labels)} rows is -100 (masked); nothing is left to predict")
    if content is not None and content.shape != labels.shape:
        raise DataError(
            f"a batch has {CONTENT_MASK} {list(content.shape)} for labels {list(labels.shape)}; give one number for "
            "each label"
        )
    recording: AbstractContextManager[list[Tensor]] = nullcontext([]) if layer is None else _outputs_of(model, layer)
    with recording as outputs:
        if labels.ndim == 2 and shifts_labels(model):
            first = int(mask.any(0).nonzero()[0])  # the logits of the prompt would be a large part of the work
            options = {"logits_to_keep": mask.shape[1] + 1 - first} if _can_keep_logits(model) else {}
            logits = output_logits(model, inputs, **options)[:, -1 - mask.shape[1] + first : -1]
            labels, kept = labels[:, 1 + first :], mask[:, first:]
            content = None if content is None else content[:, 1 + first :]
        else:
            logits, kept = output_logits(model, inputs), mask
    if logits.shape[:-1] != labels.shape:
        raise ModelError(
            f"{type(model).__name__} gives logits {list(logits.shape)} for labels {list(labels.shape)}; use labels "
            "with one distribution each"
        )
    content_L = None if content is None else content[kept].bool()
    rows_L = kept.nonzero()[:, 0]
    predictions = Predictions(logits[kept], labels[kept], rows_L, len(labels), inputs=inputs, content_L=content_L)
    _check_range(predictions)
    if layer is None:
        return predictions
    if not outputs:
        raise ModelError(f"layer {layer!r} did not run; name a module that is part of every forward pass")
    return replace(predictions, hidden=_hidden(outputs[0], mask, inputs))


def _check_range(predictions: Predictions) -> None:
    low, high = predictions.labels_L.aminmax()
    classes = predictions.logits_LV.shape[-1]
    if low < 0 or high >= classes:
        wrong = int(low if low < 0 else high)
        raise DataError(
            f"label {wrong} is none of the model's {classes} classes (0 to {classes - 1}); check the labels"
        )


def find_module(model: nn.Module, layer: int | str) -> nn.Module:
    """Return a module by name, or by number the block of the model's stack of blocks.

    The stack is the outermost and longest list of modules; in an encoder-decoder, that of the decoder. Negative numbers
    count from the end.

    >>> model = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 3)])})
    >>> find_module(model, -1) is find_module(model, "blocks.1")
    True

    Raises:
        SettingsError: The model has no such module.
    """
    model = without_wrapper(getattr(model, "module", model))
    if isinstance(layer, int) and has_decoder(model):
        model = model.get_decoder()  # type: ignore[operator]
    modules = {base_name(name): module for name, module in model.named_modules()}
    if isinstance(layer, str):
        if layer not in modules:
            raise SettingsError(
                f"the model has no module {layer!r}; name one of model.named_modules(), or give the number of a block"
            )
        return modules[layer]
    stacks = {name: module for name, module in modules.items() if isinstance(module, nn.ModuleList)}
    if not stacks:
        raise SettingsError("the model has no stack of blocks; give layer the name of a module instead of a number")
    depth = min(name.count(".") for name in stacks)
    stack = max((module for name, module in stacks.items() if name.count(".") == depth), key=len)
    if not -len(stack) <= layer < len(stack):
        raise SettingsError(f"layer is {layer}, the model has blocks 0 to {len(stack) - 1}; choose one of these")
    return stack[layer]


@contextmanager
def _outputs_of(model: nn.Module, layer: int | str) -> Iterator[list[Tensor]]:
    """Collect the outputs of a module inside this scope."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[object, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handle = find_module(model, layer).register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()


def _hidden(states: Tensor, mask: Tensor, inputs: Batch) -> Hidden:
    """Return the states behind each label: all unmasked positions for a class label, and the position that predicts it
    for a token label.

    `mask` is the one of `label_positions`.
    """
    if mask.ndim == 2:
        if states.ndim != 3 or states.shape[1] - mask.shape[1] not in (0, 1):
            raise ModelError(
                f"the layer's outputs {list(states.shape)} are not one state for each label position "
                f"({mask.shape[1]}); name another layer, such as a block of the decoder"
            )
        states_LPD = states[:, : mask.shape[1]][mask].unsqueeze(1)
        return Hidden(states_LPD, torch.ones_like(states_LPD[..., 0], dtype=torch.bool))
    states_BPD = (
        states.flatten(2).transpose(1, 2) if states.ndim == 4 else states.reshape(len(states), -1, states.shape[-1])
    )
    seen_BP = inputs.get("attention_mask")
    if seen_BP is None or seen_BP.shape != states_BPD.shape[:2]:
        seen_BP = torch.ones_like(states_BPD[..., 0])
    return Hidden(states_BPD[mask], seen_BP.bool()[mask])
