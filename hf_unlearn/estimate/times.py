"""Time of a deletion request: operations, communication and seconds, by phase.

Shapes: I inputs and O outputs of a layer, N rows of a batch, R columns of a sketch, P processes. Cost model: METHOD,
section 6.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hf_unlearn.constraints.base import Constraint
from hf_unlearn.estimate.sizes import (
    EstimateSettings,
    Trace,
    decomposed_sizes,
    entries,
    is_exact,
    right_factor_bytes,
    sums_bytes,
    trained_bytes,
)
from hf_unlearn.statistics.sketch import EXACT, Sketching
from hf_unlearn.statistics.sums import products_share


@dataclass(frozen=True)
class Work:
    """The rows and steps of a request, and the throughput of the device.

    Attributes:
        rows: Rows to collect on.
        forget_rows: Rows to forget.
        batch_size: Rows of a batch on each process, when collecting and training.
        steps: Optimizer steps.
        tflops: 10^12 operations a second in the precision of the weights.
        tflops64: 10^12 operations a second in float64.
        bandwidth: 10^9 bytes a second of device memory.
        interconnect: 10^9 bytes a second from and to other processes.
    """

    rows: int
    forget_rows: int
    batch_size: int
    steps: int
    tflops: float
    tflops64: float
    bandwidth: float
    interconnect: float


@dataclass(frozen=True)
class Phase:
    """Operations of all processes together, and seconds."""

    flops: float
    seconds: float


def estimate_times(trace: Trace, settings: EstimateSettings, work: Work) -> dict[str, Phase]:
    """Estimate operations and seconds of collecting, decomposing, one step, and the complete request.

    Evaluations and the forward pass by which single rows stop are not included.

    >>> from transformers import LlamaConfig
    >>> from hf_unlearn.estimate import EstimateSettings, Work, estimate_times, trace_model
    >>> from hf_unlearn import build_loss
    >>> config = LlamaConfig(
    ...     vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    ... )
    >>> trace = trace_model(config, "language-model", build_loss("ce_u"), batch_size=2, length=8)
    >>> work = Work(
    ...     rows=40, forget_rows=4, batch_size=2, steps=3, tflops=60, tflops64=20, bandwidth=2000, interconnect=100
    ... )
    >>> times = estimate_times(trace, EstimateSettings(constraint="energy"), work)
    >>> list(times)
    ['collect', 'decompose', 'step', 'request']
    >>> times["request"].flops == times["collect"].flops + times["decompose"].flops + 3 * times["step"].flops
    True

    Args:
        trace: Sizes of the model and cost of one batch, from `trace_model`.
        settings: Settings of the request.
        work: Its rows and steps, and the throughput of the device.

    Raises:
        SettingsError: Unknown constraint.
    """
    P, fisher = settings.processes, settings.has_fishers
    batches = -(-work.rows // work.batch_size) + -(-work.forget_rows // work.batch_size)
    rate, rate64 = work.tflops * 1e12, work.tflops64 * 1e12
    passes = 1 if settings.max_memory is None else -(-sums_bytes(trace, fisher) // settings.max_memory)
    forward, products = batches * passes * trace.collected, batches * product_flops(trace, fisher, settings.place)
    collect = Phase(forward + products, (forward / rate + products / rate64) / P)
    sizes = [n for group in decomposed_sizes(trace, settings.constraint_class) for n in group]
    operations, read = decomposition_cost(sizes, trace.sketching)
    decompose = Phase(operations, (operations / rate64 + read / (work.bandwidth * 1e9)) / min(P, max(len(sizes), 1)))
    constraint = constraint_flops(trace, settings.constraint_class)
    sharded = settings.sharding == "fsdp2"
    flops = P * (trace.forward + trace.backward) + constraint * (1 if sharded else P)
    moved = sum(communication(trace, settings).values())
    copies = 12 * trained_bytes(trace) / (P if sharded else 1)
    seconds = flops / P / rate + copies / (work.bandwidth * 1e9) + moved / (work.interconnect * 1e9)
    step = Phase(flops, seconds)
    request = Phase(
        collect.flops + decompose.flops + work.steps * step.flops,
        collect.seconds + decompose.seconds + work.steps * step.seconds,
    )
    return {"collect": collect, "decompose": decompose, "step": step, "request": request}


def product_flops(trace: Trace, fisher: bool, place: str) -> float:
    """Return the float64 operations of the sums of one batch.

    `2 N I^2` for each Gram and `2 N O^2` for each Fisher. Wide sums that are not in shards skip the products below the
    diagonal. A sketch takes `2 N I R`.
    """

    def flops(rows: int, n: int) -> float:
        if not is_exact(n, trace.sketching):
            return 2.0 * rows * entries(n, trace.sketching)
        return 2.0 * rows * n * n * (1.0 if place == "shards" else products_share(n))

    grams = sum(flops(trace.positions[key], n) for key, n in trace.grams.items())
    fishers = sum(flops(trace.positions[layer.gram], layer.outputs) for layer in trace.layers.values())
    return grams + fishers * fisher


def decomposition_cost(sizes: Sequence[int], sketching: Sketching = EXACT) -> tuple[float, float]:
    """Return the float64 operations of `eigh`, `9 n^3`, and the bytes it reads, `8/3 n^3`, while it tridiagonalises.

    Householder reduction `4/3 n^3` (half of it matrix times vector, which reads the rest of the matrix each time),
    divide and conquer up to `8/3 n^3` twice, back-transformation `2 n^3`: Golub and Van Loan, sections 8.3 and 8.5. A
    sketch takes the `eigh` of its core and an SVD of `n x R`: `8 n R^2` for the products and the QR, `22 R^3`
    (section 8.6).
    """
    exact = [n for n in sizes if is_exact(n, sketching)]
    thin, rank = [n for n in sizes if not is_exact(n, sketching)], sketching.rank
    operations = sum(9.0 * n**3 for n in exact) + sum(8.0 * n * rank**2 + 31.0 * rank**3 for n in thin)
    return operations, sum(8 / 3 * n**3 for n in exact) + len(thin) * 8 * rank**3


def constraint_flops(trace: Trace, constraint: type[Constraint] | None) -> float:
    """Return the operations of constraining one step.

    Each application of a right factor takes at most `2 O I^2`; anchored constraints make two (gradient and move). A
    left factor takes `2 O^2 I`. With a sketch these are `4 O I R` and `4 O R I`.
    """
    if constraint is None:
        return 0.0

    def flops(n: int) -> float:
        return (2.0 if is_exact(n, trace.sketching) else 4.0) * entries(n, trace.sketching)

    total = 0.0
    for layer in trace.layers.values():
        right, left = layer.outputs * flops(layer.inputs), layer.inputs * flops(layer.outputs)
        total += right * (1 + constraint.anchored) + left * constraint.needs_fisher
    return total


def communication(trace: Trace, settings: EstimateSettings) -> dict[str, float]:
    """Return the bytes that one process receives in one optimizer step of one micro-batch, by kind.

    FSDP2 gathers the weights for the forward and for the backward pass and sums the gradients of trained ones, each
    `(P - 1) / P` of the tensor. DDP sums gradients in a ring, twice that. An all-to-all moves `(P - 1) / P` of a
    process's share. An anchored constraint needs one for each direction of gradient and of move if the weight is
    stored as `[I, O]`; a two-sided one needs one each way on one of its sides. Matrices in shards are gathered at each
    use: for an anchored constraint twice a weight and once more where the leak is logged, for the others once.
    """
    P, constraint = settings.processes, settings.constraint_class
    share = (P - 1) / P
    once = trained_bytes(trace)
    trained_layers = [layer for layer in trace.layers.values() if layer.trained]
    received = {"weights": 0.0, "gradients": 2 * share * once, "constraint": 0.0, "matrices": 0.0}
    if settings.sharding == "fsdp2":
        received["weights"], received["gradients"] = 2 * share * trace.weights, share * once
        for layer in trained_layers:
            size = share * trace.width * layer.outputs * layer.inputs / P
            received["constraint"] += size * _exchanges(constraint, layer.transposed)
    if settings.place == "shards" and constraint is not None:
        for layer in trained_layers:
            factors = right_factor_bytes(constraint, layer.inputs, trace.sketching)
            factors += 4 * entries(layer.outputs, trace.sketching) * constraint.needs_fisher
            received["matrices"] += share * (3 if constraint.anchored else 1) * factors
    return received if P > 1 else dict.fromkeys(received, 0.0)


def _exchanges(constraint: type[Constraint] | None, transposed: bool) -> int:
    """Return the all-to-alls of one weight in one step: one each way where a factor acts on the sharded dimension."""
    if constraint is None:
        return 0
    if constraint.needs_fisher:
        return 2
    return (4 if constraint.anchored else 2) if transposed else 0
