"""What a model predicts from only the last tokens before a label: it knows the language, not what the row is about.

This is a substitute for a model that has not learned the rows, where no checkpoint before fine-tuning exists. It is our
own; docs/results/targets.md has measurements.

Shapes: B rows, L label positions, V vocabulary entries.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_unlearn.models.forward import Predictions, counted_labels, label_places, label_positions, predict
from hf_unlearn.models.tasks import IGNORED, Batch, shifts_labels

CONTEXT = 2
"""Tokens that the model sees before a label, behind the begin token: with more it knows what the row is about."""
MOST_ROWS = 256
"""Most short rows in a forward pass."""


def predict_from_short_context(
    model: nn.Module, inputs: Batch, skip_first: bool = False, layer: int | str | None = None
) -> Predictions:
    """Return the predictions at the label positions of a batch, each from the last `CONTEXT` tokens before it.

    The begin token stays, if the row has one. An encoder-decoder sees the last `CONTEXT` tokens of its input and of its
    answer. Called like `forward.predict`.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    >>> ids = torch.tensor([[9, 1, 2, 3, 4], [8, 1, 2, 3, 4]])  # they differ before the last two tokens
    >>> labels = torch.tensor([[-100, -100, -100, -100, 4]] * 2)
    >>> predictions = predict_from_short_context(model, {"input_ids": ids, "labels": labels})
    >>> torch.equal(predictions.logits_LV[0], predictions.logits_LV[1])
    True
    """
    labels = counted_labels(model, inputs)
    mask = label_positions(model, labels, skip_first)
    names = [name for name in ("input_ids", "attention_mask") if name in inputs]
    rows = [
        {name: inputs[name][row].tolist() for name in names} | {"labels": labels[row].tolist()}
        for row in range(len(labels))
    ]
    counted = [short for row in rows for short in short_rows(model, row)]
    kept = mask[label_positions(model, labels)].tolist()  # without those that `skip_first` leaves out
    short = [row for row, is_kept in zip(counted, kept, strict=True) if is_kept]
    parts = [
        predict(model, _padded(short[start : start + MOST_ROWS], labels.device)).logits_LV
        for start in range(0, len(short), MOST_ROWS)
    ]
    whole = labels[:, 1:] if shifts_labels(model) else labels
    return Predictions(torch.cat(parts), whole[mask], mask.nonzero()[:, 0], len(labels), inputs=inputs)


def _padded(rows: Sequence[Mapping[str, Sequence[int]]], device: torch.device) -> dict[str, Tensor]:
    """Return short rows as a batch, padded on the right."""
    ones = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    fill = {"labels": IGNORED}
    return {
        name: torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(row[name]) for row in ones], batch_first=True, padding_value=fill.get(name, 0)
        ).to(device)
        for name in ones[0]
    }


def short_rows(model: nn.Module, row: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield for each predicted label of a row a row that has only the last tokens before it."""
    labels = [int(label) for label in row["labels"]]
    seen = [True] * len(row["input_ids"]) if row.get("attention_mask") is None else [*map(bool, row["attention_mask"])]
    tokens = [int(token) for token in row["input_ids"]]
    begin_token = getattr(getattr(getattr(model, "module", model), "config", None), "bos_token_id", None)
    if shifts_labels(model):
        for place in label_places(model, row):
            whole = [token for token, is_seen in zip(tokens[:place], seen[:place], strict=True) if is_seen]
            begin = whole[:1] if whole[0] == begin_token and len(whole) > CONTEXT else []  # models lean on it
            before = [*begin, *whole[-CONTEXT:]]
            yield {"input_ids": [*before, labels[place]], "labels": [*[IGNORED] * len(before), labels[place]]}
        return
    source = [token for token, is_seen in zip(tokens, seen, strict=True) if is_seen][-CONTEXT:]
    written = _decoder_inputs(model, labels)
    for place in label_places(model, row):
        before = written[: place + 1][-CONTEXT:]
        own = [*[IGNORED] * (len(before) - 1), labels[place]]
        yield {"input_ids": source, "decoder_input_ids": before, "labels": own}


def _decoder_inputs(model: nn.Module, labels: Sequence[int]) -> list[int]:
    """Return what an encoder-decoder reads to predict the labels: a start token, then the labels but the last."""
    inner = getattr(model, "module", model)
    prepare = getattr(inner, "prepare_decoder_input_ids_from_labels", None)
    if prepare is not None:
        device = next(model.parameters()).device
        return [int(token) for token in prepare(labels=torch.tensor([labels], device=device))[0]]
    config = getattr(inner, "config", None)
    names = ("decoder_start_token_id", "bos_token_id", "pad_token_id")
    start = next((value for name in names if (value := getattr(config, name, None)) is not None), 0)
    return [start, *(max(label, 0) for label in labels[:-1])]
