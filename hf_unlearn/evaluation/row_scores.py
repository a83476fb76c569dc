"""Scores of each row under one model, all from one forward pass.

Shapes: B rows, L label positions, V classes or vocabulary entries, C classes, S scores a row.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hf_unlearn.core.processes import gather, own_indices, world
from hf_unlearn.errors import DataError
from hf_unlearn.models.forward import Predictions, predict
from hf_unlearn.models.modes import eval_mode
from hf_unlearn.models.tasks import Collator

MIN_K = 0.4  # share of a row's labels that the min-k attacks look at (MUSE, 2.2; OpenUnlearning)
MIN_VARIANCE = 1e-6  # min-k++ divides by a deviation; a certain prediction has none
CHUNK = 1 << 24  # elements of the largest float32 tensor made here


@dataclass(frozen=True)
class RowScores:
    """One number per row, float64; NaN throughout where a logit of the row is NaN.

    OpenUnlearning leaves each row's last label, taken for the end token, out of all but the loss; here every label
    counts, also of texts that have none.

    Attributes:
        loss: Mean negative log-likelihood of the row's labels, in nats.
        probability: `exp(-loss)`: the length-normalised probability of the answer, or that of the class (TOFU, 2.2).
        accuracy: Share of labels that are the most probable one; of an answer, its exact memorisation
            (Tirumala et al., NeurIPS 2022).
        entropy: Mean entropy of the predicted distribution, in nats.
        extraction_strength: `1 - k / T`, where after the first k of T labels all others are the most probable ones;
            0 if the last is not, where OpenUnlearning has 1 / T (Carlini et al., USENIX Security 2021).
        min_k: Minus the mean of the lowest 40% of the labels' log-probabilities (Shi et al., ICLR 2024).
        min_k_plus_plus: The same of `(log p - mu) / sigma`, with the mean and deviation of log-probabilities under the
            prediction itself (Zhang et al., ICLR 2025).
    """

    loss: NDArray
    probability: NDArray
    accuracy: NDArray
    entropy: NDArray
    extraction_strength: NDArray
    min_k: NDArray
    min_k_plus_plus: NDArray

    @classmethod
    def concatenate(cls, parts: Sequence["RowScores"]) -> "RowScores":
        return cls(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)})

    @classmethod
    def from_matrix(cls, scores_BS: NDArray) -> "RowScores":
        """Rebuild from the columns of `score_predictions`, as a Trainer gathers them."""
        return cls(*(np.asarray(scores_BS[:, i], dtype=np.float64) for i in range(len(fields(cls)))))


def score_predictions(predictions: Predictions) -> Tensor:
    """`[B, S]`: the scores of each row, in `RowScores`' order, float64.

    Raises:
        DataError: A row has no label to predict.
        ModelError: Logits that are no numbers.
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
    nan_B = predictions.sum_by_row(nll_L.isnan().double()) > 0  # sorting and comparing lose it
    return torch.stack(scores, dim=1).masked_fill(nan_B.unsqueeze(1), torch.nan)


def label_scores(logits_LV: Tensor, labels_L: Tensor) -> Tensor:
    """`[4, L]`, float64: each label's negative log-likelihood, whether it is the most probable (1 or 0), the entropy of
    the prediction, and the standardised log-probability of min-k++."""
    rows = max(1, CHUNK // max(logits_LV.shape[1], 1))
    parts = [_label_scores(z, y) for z, y in zip(logits_LV.split(rows), labels_L.split(rows), strict=True)]
    return torch.cat(parts, dim=1)


def _label_scores(logits_LV: Tensor, labels_L: Tensor) -> Tensor:
    log_p_LV = (logits_LV if logits_LV.dtype == torch.float64 else logits_LV.float()).log_softmax(-1)
    log_p_L = log_p_LV.gather(1, labels_L.unsqueeze(1)).squeeze(1).double()
    right_L = (log_p_LV.argmax(-1) == labels_L).double()
    p_LV = log_p_LV.exp()
    entropy_L = torch.special.entr(p_LV).sum(-1).double()
    # a masked class has log-probability -inf and weight 0: without the mask their product would be NaN
    squares_LV = (log_p_LV + entropy_L.unsqueeze(1).to(log_p_LV.dtype)).square_().mul_(p_LV)
    variance_L = squares_LV.masked_fill_(p_LV == 0, 0).sum(-1).double().clamp(min=MIN_VARIANCE)
    return torch.stack([-log_p_L, right_L, entropy_L, (log_p_L + entropy_L) / variance_L.sqrt()])


def _right_suffix(predictions: Predictions, right_L: Tensor) -> Tensor:
    """How many of each row's last labels are right, without a gap: `[B]`."""
    lengths_B, place_L = predictions.lengths_B, _places(predictions)
    after_wrong_L = torch.where(right_L == 1, 0, place_L + 1)
    return lengths_B - torch.zeros_like(lengths_B).scatter_reduce(0, predictions.rows_L, after_wrong_L, "amax")


def _mean_of_lowest(predictions: Predictions, values_L: Tensor, share: float = MIN_K) -> Tensor:
    """Mean of the lowest `share` of each row's values, rounded down, but of one at least: `[B]`."""
    order_L = values_L.argsort(stable=True)
    order_L = order_L[predictions.rows_L[order_L].argsort(stable=True)]  # by row, ascending within each
    counts_B = (predictions.lengths_B * share).long().clamp(min=1)
    chosen_L = _places(predictions) < counts_B[predictions.rows_L]
    lowest_L = values_L.new_zeros(values_L.shape).masked_scatter(chosen_L, values_L[order_L][chosen_L])
    return predictions.sum_by_row(lowest_L) / counts_B


def _places(predictions: Predictions) -> Tensor:
    """The place of each label position in its row, from 0; rows come one after the other."""
    lengths_B = predictions.lengths_B
    starts_B = lengths_B.cumsum(0) - lengths_B
    return torch.arange(len(predictions.rows_L), device=lengths_B.device) - starts_B[predictions.rows_L]


def score_rows(model: nn.Module, dataset: Any, collator: Collator, batch_size: int = 16) -> RowScores:
    """Score every row of `dataset` in eval mode; the model's mode is restored.

    In a distributed run every process scores its share, and all get the scores of all rows, in order.

    Raises:
        DataError: A row has no label to predict.
    """
    return RowScores.from_matrix(map_predictions(score_predictions, model, dataset, collator, batch_size))


def score_classes(
    model: nn.Module, dataset: Any, collator: Collator, batch_size: int = 16
) -> tuple[RowScores, NDArray]:
    """As `score_rows` of a classifier, with its softmax outputs `[N, C]`, from the same forward pass.

    Raises:
        DataError: The rows have sequences of labels.
    """

    def score(predictions: Predictions) -> Tensor:
        if len(predictions.labels_L) != predictions.n_rows:
            raise DataError("rows with a sequence of labels have no class probabilities: this is for classifiers")
        return torch.cat([score_predictions(predictions), predictions.logits_LV.double().softmax(-1)], dim=1)

    found = map_predictions(score, model, dataset, collator, batch_size)
    count = len(fields(RowScores))
    return RowScores.from_matrix(found[:, :count]), found[:, count:]


def map_predictions(
    function: Callable[[Predictions], Tensor], model: nn.Module, dataset: Any, collator: Collator, batch_size: int
) -> NDArray:
    """`function` of the predictions of every batch, a row of it for each row: `[N, ...]`; see `map_rows`."""
    device = next(model.parameters()).device

    def call(rows: Sequence[Any]) -> list[NDArray]:
        batch = {key: value.to(device) for key, value in collator(rows).items()}
        return list(function(predict(model, batch)).cpu().numpy())

    with torch.no_grad():
        return np.stack(map_rows(call, model, dataset, batch_size))


def map_rows(function: Callable[[Sequence[Any]], list], model: nn.Module, dataset: Any, batch_size: int) -> list:
    """`function` of batches of rows, a result per row, in the order of `dataset`; the model is in eval mode meanwhile.

    Every process takes its own rows and gets the results of all. All make the same number of calls, with rows whose
    results are dropped where they have none left: a sharded model needs every process at every forward pass.
    """
    own, size = own_indices(len(dataset)), world()[1]
    found: list = []
    with eval_mode(model):
        for start in range(0, len(own_indices(len(dataset), 0)), batch_size):
            mine = own[start : start + batch_size]
            found += function([dataset[i] for i in mine or range(1)])[: len(mine)]
    results: list = [None] * len(dataset)
    for rank, part in enumerate(gather(found)):
        results[rank::size] = part
    return results
