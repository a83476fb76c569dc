"""Memory of a deletion request: bytes on the device of one process, by phase.

Shapes: I inputs and O outputs of a layer, K rank of its basis, P processes. What is held in each phase follows the code
of `statistics` (collecting, decompositions), `constraints` (matrices, anchors) and `trainer` (copies to stop at).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_unlearn.estimate.sizes import (
    EstimateSettings,
    Trace,
    decomposed_sizes,
    entries,
    factor_bytes,
    optimizer_bytes,
    sum_sizes,
    sums_bytes,
    trained_bytes,
)
from hf_unlearn.statistics.sketch import EXACT, Sketching


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of one process.

    Attributes:
        held: Bytes held while training, by kind of tensor.
        phases: Peak of each phase: `load`, `collect`, `decompose`, `bind`, `train`.
    """

    held: Mapping[str, int]
    phases: Mapping[str, int]

    @property
    def peak(self) -> int:
        """Largest peak of all phases."""
        return max(self.phases.values())


def estimate_memory(trace: Trace, settings: EstimateSettings) -> Memory:
    """Estimate the bytes on the device of one process, by kind of tensor and by phase.

    Measured peaks of loading, collecting, decomposing and training are within 15% (`tests/estimate`).

    >>> from transformers import LlamaConfig
    >>> from hf_unlearn.estimate import EstimateSettings, estimate_memory, trace_model
    >>> from hf_unlearn import build_loss
    >>> config = LlamaConfig(
    ...     vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    ... )
    >>> trace = trace_model(config, "language-model", build_loss("ce_u"), batch_size=2, length=8)
    >>> memory = estimate_memory(trace, EstimateSettings(constraint="energy"))
    >>> memory.held["weights"] == trace.weights, memory.held["gradients"] == memory.held["anchors"]
    (True, True)
    >>> list(memory.phases)
    ['load', 'collect', 'decompose', 'bind', 'train']

    Args:
        trace: Sizes of the model and cost of one batch, from `trace_model`.
        settings: Settings of the request.

    Raises:
        SettingsError: Unknown constraint, or an optimizer whose state is not known.
    """
    P, place, constraint = settings.processes, settings.place, settings.constraint_class
    shards = P if settings.sharding == "fsdp2" else 1
    before = shards if settings.sharded_before else 1
    groups = decomposed_sizes(trace, constraint)
    kept = {"device": 1.0, "shards": 1 / P, "cpu": 0.0, "disk": 0.0}[place]
    sums, trained = sums_bytes(trace, settings.has_fishers), trained_bytes(trace)
    statistics = int(kept * sums * settings.sets)
    vectors = int(kept * sum(4 * entries(n, trace.sketching) for sizes in groups for n in sizes))
    factors = int(kept * factor_bytes(trace, constraint))
    largest = max((entries(n, trace.sketching) for sizes in groups for n in sizes), default=0)
    gathered = trace.unsharded if shards > 1 else 0
    loaded = trace.weights // before + (gathered if before > 1 else 0)
    anchors, weights = trained // shards, trace.weights // shards + gathered
    state = optimizer_bytes(trace, settings.optim) // shards
    copies = trained // shards * (1 + settings.stops)
    matrix = max((layer.outputs * layer.inputs for layer in trace.layers.values()), default=0)
    fetched = 4 * largest if place != "device" else 0
    held = weights + copies + statistics + vectors + factors
    gradients = trained // shards
    buckets = trained if P > 1 and settings.sharding == "none" else 0  # DDP's copies of the gradients
    step = gradients + (2 * trained // shards if settings.relative_step else 0) + 4 * 4 * matrix // shards + fetched
    passes = trace.training if shards == 1 else trace.activations + gradients
    dense = constraint is not None and constraint.factor_share == 1.0  # made from the vectors in float64
    binding = 24 * largest * dense + fetched
    phases = {
        "load": loaded,
        "collect": loaded + _collecting_bytes(trace, settings, sums, kept),
        "decompose": loaded + statistics + decomposition_peak(groups, P, kept, trace.sketching),
        "bind": loaded + statistics + vectors + factors + max(binding, trained // before),
        "train": held + state + buckets + max(passes, step),
    }
    kinds = {
        "weights": weights,
        "statistics": statistics,
        "decompositions": vectors,
        "constraint": factors,
        "anchors": anchors,
        "copy to stop at": copies - anchors,
        "gradients": gradients + buckets,
        "optimizer": state,
        "activations": trace.activations,
    }
    return Memory(kinds, phases)


def decomposition_peak(
    groups: Sequence[Sequence[int]], processes: int = 1, kept: float = 1.0, sketching: Sketching = EXACT
) -> int:
    """Return the largest bytes, besides the sums, while `RetainStatistics.decompose` runs on one of P processes.

    A process first has all of its matrices (float64), then replaces one after the other by its vectors (float32).
    LAPACK's `dsyevd` takes the matrix, its copy and twice its size, four matrices in all; the SVD of a sketch as many.
    The decomposition of a layer that sees fewer positions than half its features takes less (`statistics.eigen`), so
    this is an upper bound.

    Args:
        groups: Numbers of features of the matrices; each group is decomposed after the one before it.
        processes: Number of processes P.
        kept: Share of the finished vectors that stays on the device.
        sketching: Which matrices are sketches.
    """
    held, peak = 0.0, 0.0
    for sizes in groups:
        all_numbers = [entries(n, sketching) for n in sizes]
        waiting = sorted(all_numbers, reverse=True)[::processes] if processes > 1 else all_numbers
        finished = 0.0
        remaining = float(sum(8 * numbers for numbers in waiting))
        for numbers in waiting:
            remaining -= 8 * numbers
            peak = max(peak, held + remaining + finished + 32 * numbers)
            finished += 4 * numbers
        held += kept * sum(4 * numbers for numbers in all_numbers)
        peak = max(peak, held + (4 * max(all_numbers) if processes > 1 else 0))
    return int(peak)


def _collecting_bytes(trace: Trace, settings: EstimateSettings, sums: int, kept: float) -> int:
    """Return the bytes besides the weights while collecting: sums, activations, rows of all processes.

    At the end each sum is checked for finite values, which takes one tensor of its size and two masks.
    """
    P, in_shards = settings.processes, settings.place == "shards"
    largest = max(entries(n, trace.sketching) for n in sum_sizes(trace, settings.has_fishers))
    passing = max(trace.collecting, 10 * largest // (P if in_shards else 1))
    others = int(kept * sums * (settings.sets > 1))  # the full set's sums, while the forget set's are collected
    if in_shards and P > 1:
        rows = max(16 * P * trace.positions[key] * n for key, n in trace.grams.items())
        return others + sums // P + max(trace.collecting + rows, passing)
    unfinished = sums if settings.max_memory is None else min(sums, settings.max_memory)
    finished = 0 if settings.place in ("cpu", "disk") or settings.max_memory is None else sums - unfinished
    return others + unfinished + finished + passing
