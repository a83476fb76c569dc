"""Scores of each row under one model. Shapes: B rows, L label positions, V classes or vocabulary entries."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hf_unlearn.errors import DataError, ModelError
from hf_unlearn.predictions import Batch, Predictions, predict
from hf_unlearn.sharding import gather, own_indices, world


@dataclass(frozen=True)
class RowScores:
    """One number per row, float64.

    Attributes:
        loss: Mean negative log-likelihood of the row's labels, in nats.
        probability: `exp(-loss)`: the length-normalised probability of the answer, or that of the class (TOFU, 2.2).
        accuracy: Share of labels that are the most probable one.
        entropy: Mean entropy of the predicted distribution, in nats.
    """

    loss: NDArray
    probability: NDArray
    accuracy: NDArray
    entropy: NDArray

    @classmethod
    def concatenate(cls, parts: Sequence["RowScores"]) -> "RowScores":
        return cls(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)})

    @classmethod
    def from_matrix(cls, scores_B4: NDArray) -> "RowScores":
        """Rebuild from the columns of `as_matrix`, as a Trainer gathers them."""
        return cls(*(np.asarray(scores_B4[:, i], dtype=np.float64) for i in range(len(fields(cls)))))


def row_scores(predictions: Predictions) -> Tensor:
    """`[B, 4]`: loss, probability, accuracy and entropy of each row, in `RowScores`' order.

    Raises:
        DataError: A row has no label to predict.
        ModelError: Logits that are no numbers.
    """
    if not predictions.lengths_B.all():
        row = int((predictions.lengths_B == 0).nonzero()[0])
        raise DataError(f"row {row} of a batch of {predictions.n_rows} has no label to predict; leave such rows out")
    logits_LV = predictions.logits_LV
    log_p_LV = (logits_LV if logits_LV.dtype == torch.float64 else logits_LV.float()).log_softmax(-1)
    nll_L = -log_p_LV.gather(1, predictions.labels_L.unsqueeze(1)).squeeze(1).double()
    if nll_L.isnan().any():
        row = int(predictions.rows_L[nll_L.isnan()][0])
        raise ModelError(
            f"the model's logits are NaN on row {row} of a batch of {predictions.n_rows}; its weights are broken"
        )
    right_L = (log_p_LV.argmax(-1) == predictions.labels_L).double()
    entropy_L = torch.special.entr(log_p_LV.exp()).sum(-1).double()
    lengths_B = predictions.lengths_B.double()
    loss_B, accuracy_B, entropy_B = (predictions.sum_by_row(v) / lengths_B for v in (nll_L, right_L, entropy_L))
    return torch.stack([loss_B, (-loss_B).exp(), accuracy_B, entropy_B], dim=1)


@torch.no_grad()
def score_rows(
    model: nn.Module,
    dataset: Any,
    collator: Callable[[Sequence[Mapping[str, Any]]], Batch],
    batch_size: int = 16,
) -> RowScores:
    """Score every row of `dataset` in eval mode; the model's mode is restored.

    In a distributed run every process scores its share, and all get the scores of all rows, in order.

    Raises:
        DataError: A row has no label to predict.
    """
    device = next(model.parameters()).device
    training = model.training
    own, size = own_indices(len(dataset)), world()[1]
    share = torch.utils.data.Subset(dataset, own or range(1))
    loader = DataLoader(share, batch_size=batch_size, collate_fn=collator)
    rounds = len(range(0, len(own_indices(len(dataset), 0)), batch_size))
    model.eval()
    try:
        scores, inputs = [], {}
        for batch in loader:
            inputs = {key: value.to(device) for key, value in batch.items()}
            scores.append(row_scores(predict(model, inputs)).cpu().numpy())
        for _ in range(rounds - len(loader)):  # a sharded model needs every process at every forward pass
            predict(model, inputs)
    finally:
        model.train(training)
    scores_N4 = np.empty((len(dataset), len(fields(RowScores))))
    for rank, part_N4 in enumerate(gather(np.concatenate(scores)[: len(own)])):
        scores_N4[rank::size] = part_N4
    return RowScores.from_matrix(scores_N4)
