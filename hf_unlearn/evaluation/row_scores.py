"""Scores of each row under one model, all from one forward pass.

The trainer uses them too, so this module imports no library of metrics.

Shapes: B rows, L label positions, V classes or vocabulary entries, C classes, S scores a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hf_unlearn.core.processes import gather, own_indices, world
from hf_unlearn.core.text import ShortRepr
from hf_unlearn.data.batches import with_content_mask
from hf_unlearn.data.encoding import encode_dataset
from hf_unlearn.data.formats import Row, Rows
from hf_unlearn.errors import DataError
from hf_unlearn.models.forward import Predictions, predict
from hf_unlearn.models.modes import eval_mode
from hf_unlearn.models.tasks import Collator

Result = TypeVar("Result")

MIN_K = 0.4  # share of a row's labels that the min-k attacks read (MUSE, 2.2; OpenUnlearning)
MIN_VARIANCE = 1e-6  # min-k++ divides by a standard deviation, which is 0 for a certain prediction
CHUNK = 1 << 24  # elements of the largest float32 tensor allocated here


@dataclass(frozen=True, repr=False)
class RowScores(ShortRepr):
    """Seven float64 columns with one number per row; all seven are NaN if a logit of the row is NaN.

    OpenUnlearning assumes that each row's last label is the end token and leaves it out of all scores but the loss.
    Here every label counts, because some texts have no end token.

    Attributes:
        loss: Mean negative log-likelihood of the row's labels, in nats.
        probability: `exp(-loss)`: the length-normalised probability of the answer, or the probability of the class
            (TOFU, 2.2).
        accuracy: Share of labels that are the most probable one. For an answer this is its exact memorisation
            (Tirumala et al., NeurIPS 2022).
        entropy: Mean entropy of the predicted distribution, in nats.
        extraction_strength: `1 - k / T`, where k is the smallest number of first labels (of T) after which every label
            is the most probable one; 0 if the last label is not, where OpenUnlearning has 1 / T (Carlini et al.,
            USENIX Security 2021).
        min_k: Minus the mean of the lowest 40% of the labels' log-probabilities (Shi et al., ICLR 2024).
        min_k_plus_plus: The same for `(log p - mu) / sigma`, with the mean and standard deviation of log-probabilities
            under the predicted distribution (Zhang et al., ICLR 2025).
    """

    loss: NDArray
    probability: NDArray
    accuracy: NDArray
    entropy: NDArray
    extraction_strength: NDArray
    min_k: NDArray
    min_k_plus_plus: NDArray

    @classmethod
    def concatenate(cls, scores: Sequence["RowScores"]) -> "RowScores":
        """Join the scores of several data sets."""
        return cls(**{f.name: np.concatenate([getattr(s, f.name) for s in scores]) for f in fields(cls)})

    @classmethod
    def from_matrix(cls, scores_BS: NDArray) -> "RowScores":
        """Rebuild the scores from the matrix of `score_predictions`, which is what a Trainer gathers."""
        return cls(*(np.asarray(scores_BS[:, i], dtype=np.float64) for i in range(len(fields(cls)))))


def score_predictions(predictions: Predictions) -> Tensor:
    """Return the scores of each row of a batch: `[B, S]`, float64, in the order of the fields of `RowScores`.

    >>> import torch
    >>> from hf_unlearn.models.forward import Predictions
    >>> logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> scores = score_predictions(Predictions(logits, labels_L=torch.tensor([0, 0]), rows_L=torch.arange(2), n_rows=2))
    >>> scores[:, 1].round(decimals=3).tolist()  # the probabilities
    [0.731, 0.269]

    Raises:
        DataError: A row has no label to predict.
    """
    if not predictions.lengths_B.all():
        row = int((predictions.lengths_B == 0).nonzero()[0])
        raise DataError(f"row {row} of a batch of {predictions.n_rows} has no label to predict; leave such rows out")
    nll_L, right_L, entropy_L, standard_L = label_scores(predictions.logits_LV, predictions.labels_L)
    lengths_B = predictions.lengths_B
    loss_B, accuracy_B, entropy_B = (
        predictions.sum_by_row(values_L) / lengths_B for values_L in (nll_L, right_L, entropy_L)
    )
    scores = [
        loss_B,
        (-loss_B).exp(),
        accuracy_B,
        entropy_B,
        _right_suffix(predictions, right_L) / lengths_B,
        -_mean_of_lowest(predictions, -nll_L),
        -_mean_of_lowest(predictions, standard_L),
    ]
    nan_B = predictions.sum_by_row(nll_L.isnan().double()) > 0  # argmax and sorting would hide the NaN
    return torch.stack(scores, dim=1).masked_fill(nan_B.unsqueeze(1), torch.nan)


def label_scores(logits_LV: Tensor, labels_L: Tensor) -> Tensor:
    """Return four scores of each label: `[4, L]`, float64.

    They are the negative log-likelihood, whether the label is the most probable one (1 or 0), the entropy of the
    prediction, and the standardised log-probability of min-k++.
    """
    rows = max(1, CHUNK // max(logits_LV.shape[1], 1))
    chunks = [_label_scores(z, y) for z, y in zip(logits_LV.split(rows), labels_L.split(rows), strict=True)]
    return torch.cat(chunks, dim=1)


def _label_scores(logits_LV: Tensor, labels_L: Tensor) -> Tensor:
    log_p_LV = (logits_LV if logits_LV.dtype == torch.float64 else logits_LV.float()).log_softmax(-1)
    log_p_L = log_p_LV.gather(1, labels_L.unsqueeze(1)).squeeze(1).double()
    right_L = (log_p_LV.argmax(-1) == labels_L).double()
    p_LV = log_p_LV.exp()
    entropy_L = torch.special.entr(p_LV).sum(-1).double()
    # a masked class has log-probability -inf and probability 0; without masked_fill_ their product would be NaN
    squares_LV = (log_p_LV + entropy_L.unsqueeze(1).to(log_p_LV.dtype)).square_().mul_(p_LV)
    variance_L = squares_LV.masked_fill_(p_LV == 0, 0).sum(-1).double().clamp(min=MIN_VARIANCE)
    return torch.stack([-log_p_L, right_L, entropy_L, (log_p_L + entropy_L) / variance_L.sqrt()])


def _right_suffix(predictions: Predictions, right_L: Tensor) -> Tensor:
    """Return the length of the longest suffix of each row whose labels are all right: `[B]`."""
    lengths_B, position_L = predictions.lengths_B, _positions_in_row(predictions)
    after_wrong_L = torch.where(right_L == 1, 0, position_L + 1)
    return lengths_B - torch.zeros_like(lengths_B).scatter_reduce(0, predictions.rows_L, after_wrong_L, "amax")


def _mean_of_lowest(predictions: Predictions, values_L: Tensor, share: float = MIN_K) -> Tensor:
    """Return the mean of the lowest `share` of each row's values (rounded down, at least one value): `[B]`."""
    order_L = values_L.argsort(stable=True)
    order_L = order_L[predictions.rows_L[order_L].argsort(stable=True)]  # by row, ascending within a row
    counts_B = (predictions.lengths_B * share).long().clamp(min=1)
    chosen_L = _positions_in_row(predictions) < counts_B[predictions.rows_L]
    lowest_L = values_L.new_zeros(values_L.shape).masked_scatter(chosen_L, values_L[order_L][chosen_L])
    return predictions.sum_by_row(lowest_L) / counts_B


def _positions_in_row(predictions: Predictions) -> Tensor:
    """Return the index of each label within its row, from 0; the labels of a row are adjacent."""
    lengths_B = predictions.lengths_B
    starts_B = lengths_B.cumsum(0) - lengths_B
    return torch.arange(len(predictions.rows_L), device=lengths_B.device) - starts_B[predictions.rows_L]


def score_rows(model: nn.Module, dataset: Rows, collator: Collator, batch_size: int = 16) -> RowScores:
    """Score every row of `dataset` in eval mode, and restore the model's mode afterwards.

    In a distributed run each process scores its share of the rows, and all processes return the scores of all rows, in
    the order of `dataset`.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_unlearn import PaddingCollator
    >>> _ = torch.manual_seed(0)
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2))
    >>> rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4, 5], "labels": [-100, 5]}]
    >>> scores = score_rows(model, rows, PaddingCollator())
    >>> scores.loss.shape, bool((scores.probability < 0.1).all())
    ((2,), True)

    Args:
        model: The model.
        dataset: Encoded rows (see `encode_dataset`).
        collator: Makes batches of rows.
        batch_size: Rows per forward pass.

    Raises:
        DataError: Rows that are not encoded, or have no label to predict.
    """
    rows = encode_dataset(dataset, None, what="scored", model=model)
    return RowScores.from_matrix(map_predictions(score_predictions, model, rows, collator, batch_size))


def score_classes(
    model: nn.Module, dataset: Rows, collator: Collator, batch_size: int = 16
) -> tuple[RowScores, NDArray]:
    """Score every row as `score_rows` does, and return a classifier's softmax outputs `[N, C]` of the same pass.

    Raises:
        DataError: The rows have sequences of labels.
    """

    def score(predictions: Predictions) -> Tensor:
        if len(predictions.labels_L) != predictions.n_rows:
            raise DataError("rows with a sequence of labels have no class probabilities: this is for classifiers")
        return torch.cat([score_predictions(predictions), predictions.logits_LV.double().softmax(-1)], dim=1)

    columns = map_predictions(score, model, dataset, collator, batch_size)
    count = len(fields(RowScores))
    return RowScores.from_matrix(columns[:, :count]), columns[:, count:]


def map_predictions(
    function: Callable[[Predictions], Tensor], model: nn.Module, dataset: Rows, collator: Collator, batch_size: int
) -> NDArray:
    """Apply `function` to the predictions of every batch and stack its results, one per row: `[N, ...]`."""
    device, collator = next(model.parameters()).device, with_content_mask(collator)

    def call(rows: Sequence[Row]) -> list[NDArray]:
        batch = {key: value.to(device) for key, value in collator(rows).items()}
        return list(function(predict(model, batch)).cpu().numpy())

    with torch.no_grad():
        results: list[NDArray] = map_rows(call, model, dataset, batch_size)
    return np.stack(results)


def map_rows(
    function: Callable[[Sequence[Row]], list[Result]], model: nn.Module, dataset: Rows, batch_size: int
) -> list[Result]:
    """Apply `function` to batches of rows with the model in eval mode; return one result per row, in order.

    Each process takes its share of the rows and returns the results of all. All processes make the same number of
    calls: one that has no rows left repeats a row and drops the result, because a sharded model needs every process at
    every forward pass.
    """
    indices, processes = own_indices(len(dataset)), world()[1]
    own_results: list[Result] = []
    with eval_mode(model):
        for start in range(0, len(own_indices(len(dataset), 0)), batch_size):
            batch = indices[start : start + batch_size]
            own_results += function([dataset[i] for i in batch or range(1)])[: len(batch)]
    by_index: dict[int, Result] = {}
    for rank, results in enumerate(gather(own_results)):
        by_index.update(zip(range(rank, len(dataset), processes), results, strict=True))
    return [by_index[index] for index in range(len(dataset))]
