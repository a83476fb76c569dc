"""Measurements of what steps do to the retain data, from the statistics alone: drift, and the leak of one step.

Shapes: move_OI and step_OI of a layer with O outputs and I inputs; gram_II and fisher_OO of the statistics.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from hf_unlearn.constraints.layouts import apply_right, group_of, local_squares, sum_over_shards, transposed
from hf_unlearn.constraints.trained_weights import TrainedAdapter, TrainedLayer, TrainedWeight
from hf_unlearn.core.text import ShortRepr
from hf_unlearn.statistics.eigen import Eigen
from hf_unlearn.statistics.retain_statistics import RetainStatistics

SMALLEST_OUTPUT = 1e-30
"""Lower bound of `|W_0 X^T|`, so that the relative drift of a layer with zero outputs is finite."""


@dataclass(frozen=True, repr=False)
class Drift(ShortRepr):
    """Predicted effect on the retain data of the total move `D = W - W_0` from the original weights.

    >>> drift = Drift(by_layer={"first": 0.03, "second": 0.04}, kl=None)
    >>> round(drift.relative, 4)
    0.0354

    Attributes:
        by_layer: Relative change of each layer's outputs: `sqrt(tr(D gram D^T) / tr(W_0 gram W_0^T))`.
        kl: `1/2 sum tr(fisher D gram D^T)`, in nats per label; None without a Fisher.
    """

    by_layer: dict[str, float]
    kl: float | None

    @property
    def relative(self) -> float:
        """Root mean square over layers of the relative output change; 0 without layers."""
        squares = [value**2 for value in self.by_layer.values()]
        return (sum(squares) / len(squares)) ** 0.5 if squares else 0.0


class DriftMeter:
    """Predicts the retain drift of trained layers from statistics of the retain set.

    Products with the root of a Gram replace traces, so that a small drift is not lost in cancellation
    (`Eigen.times_root`).

    Args:
        statistics: Statistics of the original weights; without them the drift is empty.
        weights, adapters: What the run trains. Layers without statistics are left out.
    """

    def __init__(
        self,
        statistics: RetainStatistics | None,
        weights: Sequence[TrainedWeight],
        adapters: Sequence[TrainedAdapter],
    ):
        self._statistics = statistics
        self._weights = weights
        covered = statistics.layers if statistics is not None else {}
        plain = [weight for weight in weights if weight.layer is not None and not weight.factor]
        layers: list[TrainedLayer] = [*plain, *adapters]
        self._layers = [layer for layer in layers if layer.owner in covered]
        self._original_outputs: dict[str, float] = {}

    @torch.no_grad()
    def measure(self) -> Drift:
        """Return the drift of the current weights (a collective call if they are sharded)."""
        statistics, layers = self._statistics, self._layers
        has_fisher = statistics is not None and bool(statistics.fisher_sums)
        if statistics is None or not layers:
            return Drift({}, 0.0 if has_fisher else None)
        output_squares: list[Tensor] = []
        kl_terms: list[Tensor] = []
        groups: list[ProcessGroup | None] = []
        for layer in layers:
            output_OI = layer.move_times_root(self._on_device(statistics.gram_eigen(layer.owner)))
            output_squares.append(local_squares([output_OI])[0])
            groups.append(group_of(output_OI))
            if has_fisher:
                fisher = self._on_device(statistics.fisher_eigen(layer.owner))
                square = local_squares([apply_right(fisher.times_root, transposed(output_OI))])[0]
                kl_terms.append(0.5 * statistics.positions_per_label(layer.owner) * square)
        sums = sum_over_shards(torch.stack(output_squares + kl_terms), groups * (2 if has_fisher else 1)).tolist()
        originals = self._original_output_norms(statistics)
        by_layer = {
            layer.owner: square**0.5 / originals[layer.owner] for layer, square in zip(layers, sums, strict=False)
        }
        return Drift(by_layer, sum(sums[len(layers) :]) if has_fisher else None)

    def _original_output_norms(self, statistics: RetainStatistics) -> dict[str, float]:
        """`|W_0 X^T|`: the root mean square of each layer's original outputs; computed once."""
        if not self._original_outputs:
            squares, groups = [], []
            for layer in self._layers:
                gram = self._on_device(statistics.gram_eigen(layer.owner))
                output_OI = apply_right(gram.times_root, layer.original_OI)
                squares.append(local_squares([output_OI])[0])
                groups.append(group_of(output_OI))
            sums = sum_over_shards(torch.stack(squares), groups).tolist()
            self._original_outputs = {
                layer.owner: max(square**0.5, SMALLEST_OUTPUT) for layer, square in zip(self._layers, sums, strict=True)
            }
        return self._original_outputs

    def _on_device(self, matrix: Eigen) -> Eigen:
        return matrix.to(self._weights[0].layout.read().device)


def step_leak(weights: Sequence[TrainedWeight]) -> float | None:
    """Return `|D U| / |D|` of the last realised step D, over all weights with an anchored constraint together.

    It is the share of the step in the core gradient space. `TrainedWeight.before` must hold the weights
    before the step. None if no weight has an anchored constraint.
    """
    squares: list[Tensor] = []
    groups: list[ProcessGroup | None] = []
    for weight in weights:
        if weight.bound is not None and weight.anchored and weight.before is not None:
            step_OI = weight.matrix(weight.layout.read().float() - weight.before.float())
            squares.append(local_squares([step_OI - weight.bound(step_OI), step_OI]))
            groups += [group_of(step_OI)] * 2
    if not squares:
        return None
    leaked, total = sum_over_shards(torch.cat(squares), groups).view(-1, 2).sum(0).tolist()
    return (leaked / total) ** 0.5 if total else None
