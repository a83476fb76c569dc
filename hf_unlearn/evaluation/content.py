"""Content: the tokens of an answer that carry what was learned. The others are function tokens.

A mean over all tokens of an answer says little about what was forgotten: most tokens would be predicted by any model of
the language, and to break these changes the mean as much as to lose the facts. A token is content if the original model
finds it at least `THRESHOLD` nats more likely than a substitute that does not know the row. METHOD, section 7.

The substitutes (`SUBSTITUTES`): the checkpoint before fine-tuning, if there is one; else the original model itself,
which sees only the last `CONTEXT` tokens before the label (behind the begin token, if the row has one), so that it
knows the language and not what the row is about.
A row whose `secret` the user has named keeps the mask that was made of it.

Shapes: B rows, L label positions, N rows of a data set, S scores a row.
"""

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hf_unlearn.core.text import ShortRepr
from hf_unlearn.data.batches import PaddingCollator, with_content_mask
from hf_unlearn.data.encoding import EncodedList
from hf_unlearn.data.formats import CONTENT_RULE, SECRET, Row, Rows, rows_of
from hf_unlearn.errors import DataError, SettingsError
from hf_unlearn.evaluation.row_scores import CHUNK, map_predictions, map_rows
from hf_unlearn.models.forward import Predictions, label_places, predict, writes_answers
from hf_unlearn.models.short_context import short_rows
from hf_unlearn.models.tasks import CONTENT_MASK, IGNORED, Collator, vocabulary_size

THRESHOLD = 2.0
"""Nats by which the original must find a content token more likely than the substitute."""
MOST_SHORT_ROWS = 512
"""Most short rows in a forward pass."""

Mask: TypeAlias = list[int]
"""For each label of a row 1 if it is content, else 0."""
Substitute: TypeAlias = Callable[[nn.Module, Rows, Collator, int], list[NDArray]]
"""Returns for each row the loss of each of its predicted labels, in nats, for a model that does not know the row.

The arguments are the model (the reference model if there is one, else the original), encoded rows, their collator and
the batch size."""


# The substitutes


def label_losses(model: nn.Module, rows: Rows, collator: Collator, batch_size: int = 16) -> list[NDArray]:
    """Return the loss of each predicted label of each row, in nats: N arrays.

    In a distributed run the processes share the rows, and all return the losses of all rows.
    """
    device = next(model.parameters()).device
    collator = with_content_mask(collator)

    def call(rows: Sequence[Row]) -> list[NDArray]:
        predictions = predict(model, {key: value.to(device) for key, value in collator(rows).items()})
        losses_L = predictions.nll_L.double().cpu().numpy()
        return np.split(losses_L, predictions.lengths_B.cumsum(0).tolist()[:-1])

    with torch.no_grad():
        return map_rows(call, model, rows, batch_size)


def short_context_losses(model: nn.Module, rows: Rows, collator: Collator, batch_size: int = 16) -> list[NDArray]:
    """Return the losses as `label_losses`, each label predicted from only the last `CONTEXT` tokens before it.

    An encoder-decoder sees the last `CONTEXT` tokens of its input and of its answer.
    """
    short = [list(short_rows(model, row)) for row in rows_of(rows)]
    padding = PaddingCollator(getattr(collator, "pad_token_id", 0))
    size = min(MOST_SHORT_ROWS, max(batch_size, CHUNK // max(vocabulary_size(model) or 1, 1)))
    all_short = [row for of_row in short for row in of_row]
    losses = np.concatenate([np.zeros(0), *label_losses(model, all_short, padding, size)]) if all_short else np.zeros(0)
    return np.split(losses, np.cumsum([len(of_row) for of_row in short])[:-1])


SUBSTITUTES: dict[str, Substitute] = {"reference": label_losses, "short context": short_context_losses}
"""The rules by which content is guessed, by the name that reports give them."""


# Masks


def has_content_rows(model: nn.Module, rows: Rows) -> bool:
    """Return whether the labels of rows are tokens of answers under this model, so that some may be content."""
    return writes_answers(model) and "input_ids" in rows[0] and np.ndim(rows[0].get("labels", 0)) == 1


def content_masks(
    model: nn.Module,
    rows: Rows,
    collator: Collator,
    reference: nn.Module | None = None,
    *,
    batch_size: int = 16,
    seen: bool = True,
) -> list[Mask]:
    """Return for each row which of its labels are content.

    A label is content if `log p_original - log p_substitute > THRESHOLD`. A row that has a `content_mask`, made of its
    `secret`, keeps it. In a distributed run the processes share the rows, and all return all masks.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_unlearn import PaddingCollator
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2))
    >>> row = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
    >>> content_masks(model, [row, {**row, "content_mask": [0, 0, 1]}], PaddingCollator())  # it has learned nothing
    [[0, 0, 0], [0, 0, 1]]

    Args:
        model: The original model, which knows the rows.
        rows: Encoded rows of a language model or of an encoder-decoder.
        collator: Makes batches of rows.
        reference: The checkpoint before fine-tuning. Without it the original is its own substitute, with a short
            context.
        batch_size: Rows per forward pass.
        seen: Whether the original was trained on the rows. For rows that it was not, such as held-out rows, a label is
            content if the substitute's loss alone is above `THRESHOLD`: what it would be if the original knew the rows.

    Raises:
        SettingsError: The reference model has another vocabulary.
        DataError: A mask is not of the length of its row's labels.
    """
    if reference is not None and vocabulary_size(reference) != vocabulary_size(model):
        raise SettingsError(
            f"the reference model has {vocabulary_size(reference)} token embeddings and the model "
            f"{vocabulary_size(model)}; pass the checkpoint that was fine-tuned"
        )
    masks = [_given_mask(row, number) for number, row in enumerate(rows_of(rows))]
    unknown = [rows[number] for number, mask in enumerate(masks) if mask is None]
    if not unknown:
        return [mask for mask in masks if mask is not None]
    substitute = SUBSTITUTES[rule_of(None, reference)]
    theirs = substitute(model if reference is None else reference, unknown, collator, batch_size)
    ours = label_losses(model, unknown, collator, batch_size) if seen else [np.zeros_like(loss) for loss in theirs]
    guessed = iter([_mask(model, *parts) for parts in zip(unknown, ours, theirs, strict=True)])
    return [next(guessed) if mask is None else mask for mask in masks]


def _given_mask(row: Row, number: int) -> Mask | None:
    mask = row.get(CONTENT_MASK)
    if mask is None:
        return None
    if len(mask) != len(row["labels"]):
        raise DataError(
            f"row {number} has {len(row['labels'])} labels and {len(mask)} {CONTENT_MASK}; give one number for each "
            "label"
        )
    return [int(bool(value)) for value in mask]


def _mask(model: nn.Module, row: Row, ours: NDArray, theirs: NDArray) -> Mask:
    mask = [0] * len(row["labels"])
    for place, is_content in zip(label_places(model, row), theirs - ours > THRESHOLD, strict=True):
        mask[place] = int(is_content)
    return mask


def rule_of(row: Row | None, reference: object = None) -> str:
    """Return the name of the rule that makes the mask of a row: `secret`, or the substitute that is compared with."""
    if row is not None and row.get(CONTENT_MASK) is not None:
        return row.get(CONTENT_RULE) or SECRET
    return "short context" if reference is None else "reference"


def substitute_losses(
    model: nn.Module, rows: Rows, collator: Collator, reference: nn.Module | None = None, batch_size: int = 16
) -> tuple[float, float]:
    """Return the substitute's mean losses on content and on function tokens: over each row's tokens, then over rows.

    Args:
        model: The original model.
        rows: Rows with masks.
        collator: Makes batches of rows.
        reference: As in `content_masks`.
        batch_size: Rows per forward pass.

    Returns:
        Both losses in nats; NaN for one of which no row has tokens.
    """
    substitute = SUBSTITUTES[rule_of(None, reference)]
    theirs = substitute(model if reference is None else reference, rows, collator, batch_size)
    means: tuple[list[float], list[float]] = ([], [])
    for row, losses in zip(rows_of(rows), theirs, strict=True):
        content = np.asarray([row[CONTENT_MASK][place] for place in label_places(model, row)], dtype=bool)
        for values, of_rows in zip((losses[content], losses[~content]), means, strict=True):
            of_rows += [float(values.mean())] if len(values) else []
    content_mean, function_mean = (float(np.mean(values)) if values else float("nan") for values in means)
    return content_mean, function_mean


def with_content(rows: Rows, masks: Sequence[Mask], reference: object = None) -> EncodedList:
    """Return rows with the masks of `content_masks` in a column `content_mask`; the rows given are not changed.

    >>> row = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
    >>> with_content([row], [[0, 0, 1]])[0]["content_mask"], sorted(row)
    ([0, 0, 1], ['input_ids', 'labels'])

    Args:
        rows: Encoded rows.
        masks: The mask of each row.
        reference: What `content_masks` was called with; the rows keep the name of the rule.
    """
    marked = EncodedList()
    for row, mask in zip(rows_of(rows), masks, strict=True):
        new = copy(row) if isinstance(row, dict) else dict(row)  # a row that was cut carries how many tokens it lacks
        new.update({CONTENT_MASK: list(mask), CONTENT_RULE: rule_of(row, reference)})
        marked.append(new)
    marked.raw, marked.unknown = getattr(rows, "raw", None), getattr(rows, "unknown", None)
    return marked


def marks_content(rows: Rows) -> bool:
    """Return whether every row of a set says which of its labels are content."""
    is_marked = len(rows) > 0 and "labels" in rows[0] and rows[0].get(CONTENT_MASK) is not None
    return is_marked and all(row.get(CONTENT_MASK) is not None for row in rows_of(rows))


def content_record(rows: Rows) -> dict[str, Any]:
    """Return how many labels of rows are content, and how many masks each rule has made, as reports have it."""
    rules = sorted(rule_of(row) for row in rows_of(rows))
    return {
        "rows": len(rows),
        "content_tokens": sum(sum(row[CONTENT_MASK]) for row in rows_of(rows)),
        "tokens": sum(int((np.asarray(row["labels"]) != IGNORED).sum()) for row in rows_of(rows)),
        "rules": {rule: len(list(same)) for rule, same in groupby(rules)},
    }


# Scores


@dataclass(frozen=True, repr=False)
class ContentScores(ShortRepr):
    """Five float64 columns with one number per row.

    Attributes:
        content_loss: Mean negative log-likelihood of the row's content tokens, in nats; NaN if it has none.
        function_loss: The same of its other tokens; NaN if it has none.
        content_known: Share of its content tokens with a probability above 0.5; NaN if it has none.
        content_tokens, function_tokens: Their numbers.
    """

    content_loss: NDArray
    function_loss: NDArray
    content_known: NDArray
    content_tokens: NDArray
    function_tokens: NDArray

    @classmethod
    def from_matrix(cls, scores_BS: NDArray) -> "ContentScores":
        """Rebuild the scores from the matrix of `score_content_predictions`."""
        return cls(*(np.asarray(scores_BS[:, i], dtype=np.float64) for i in range(len(fields(cls)))))


def score_content_predictions(predictions: Predictions) -> Tensor:
    """Return the scores of each row of a batch: `[B, S]`, float64, in the order of the fields of `ContentScores`.

    >>> predictions = Predictions(
    ...     torch.tensor([[1.0, 0.0], [0.0, 1.0]]), labels_L=torch.tensor([0, 0]), rows_L=torch.tensor([0, 0]),
    ...     n_rows=1, content_L=torch.tensor([True, False]))
    >>> score_content_predictions(predictions).round(decimals=3).tolist()
    [[0.313, 1.313, 1.0, 1.0, 1.0]]

    Raises:
        DataError: The rows do not say which labels are content.
    """
    if predictions.content_L is None:
        raise DataError(f"the rows have no column {CONTENT_MASK!r}; add it with with_content, or name their secrets")
    losses_L = predictions.nll_L.double()
    known_L = torch.where(losses_L.isnan(), torch.nan, (losses_L < np.log(2)).double())

    def mean(values_L: Tensor, chosen_L: Tensor) -> Tensor:
        return predictions.sum_by_row(torch.where(chosen_L, values_L, 0.0)) / predictions.sum_by_row(chosen_L.double())

    content_L = predictions.content_L
    scores = [mean(losses_L, content_L), mean(losses_L, ~content_L), mean(known_L, content_L)]
    counts = [predictions.sum_by_row(chosen_L.double()) for chosen_L in (content_L, ~content_L)]
    return torch.stack([*scores, *counts], dim=1)


def score_content(model: nn.Module, rows: Rows, collator: Collator, batch_size: int = 16) -> ContentScores:
    """Score content and function tokens of every row in eval mode, in order; the processes of a run share the rows.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_unlearn import PaddingCollator
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2))
    >>> rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "content_mask": [0, 0, 1]}]
    >>> scores = score_content(model, rows, PaddingCollator())
    >>> scores.content_tokens.tolist(), scores.content_known.tolist()
    ([1.0], [0.0])

    Raises:
        DataError: The rows have no `content_mask`.
    """
    return ContentScores.from_matrix(map_predictions(score_content_predictions, model, rows, collator, batch_size))


def add_content(
    splits: Mapping[str, Rows],
    original: nn.Module | None,
    collator: Collator,
    reference: nn.Module | None = None,
    *,
    unseen: Sequence[str] = (),
    batch_size: int = 16,
) -> dict[str, Rows]:
    """Return all splits, those of `forget` and of `unseen` with masks, if their labels are tokens of answers.

    Args:
        splits: Encoded rows by name.
        original: The original model. Without it, the splits are returned as they are.
        collator: Makes batches of rows.
        reference: As in `content_masks`.
        unseen: Splits that the original was not trained on.
        batch_size: Rows per forward pass.
    """
    marked = dict(splits)
    for name, rows in splits.items():
        if original is None or name not in ("forget", *unseen) or not has_content_rows(original, rows):
            continue
        masks = content_masks(original, rows, collator, reference, batch_size=batch_size, seen=name not in unseen)
        marked[name] = with_content(rows, masks, reference)
    return marked
