"""How large and how long a deletion request is, before it is run: bytes and operations from sizes alone.

Shapes: I inputs and O outputs of a layer, K rank of its basis, N rows of a batch, P processes. Bytes are those of one
process's device. What is held when is read off the code: `collector` and `statistics` (collecting, decompositions),
`constraints` (matrices), `parts`, `optimizer` and `callbacks` (training). Cost model: METHOD, section 6.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch

from hf_unlearn.constraints.base import Constraint
from hf_unlearn.constraints.registry import CONSTRAINTS, needs_fisher
from hf_unlearn.errors import SettingsError
from hf_unlearn.estimate.tracing import Trace
from hf_unlearn.statistics.sketch import EXACT, Sketching
from hf_unlearn.statistics.sums import products_share

OPTIMIZERS: Mapping[str, tuple[float, float]] = {
    "sgd": (0, 1),
    "adamw_torch": (0, 2),
    "adamw_torch_fused": (0, 2),
    "adafactor": (0, 0),
    "adagrad": (0, 1),
    "rmsprop": (0, 1),
    "lion_32bit": (4, 0),
    "adamw_8bit": (2 + 2 * 4 / 256, 0),
    "adamw_bnb_8bit": (2 + 2 * 4 / 256, 0),
    "paged_adamw_8bit": (2 + 2 * 4 / 256, 0),
    "lion_8bit": (1 + 4 / 256, 0),
}
"""State for a trained number: bytes, and copies in the precision of the weight. 8-bit states of bitsandbytes have a
float32 scale for each block of 256; its tensors below 4096 numbers are kept in float32."""
BNB_SMALLEST = 4096
SHARE = 0.9
"""Of a device's memory, what tensors may take."""


@dataclass(frozen=True)
class Settings:
    """What of a request its size depends on.

    Attributes:
        constraint: Name of the constraint.
        fisher: Whether the statistics have Fishers although the constraint does not need them.
        optim: A name in `OPTIMIZERS`.
        processes: P.
        sharding: `none` (one process, DDP) or `fsdp2`.
        place: `keep_statistics_on`.
        max_memory: Largest unfinished sums in bytes, or None.
        sharded_before: The model is in FSDP2's shards before collecting and training: your own program; the commands
            load it whole on each process.
        sets: Statistics that are held: 1, or 3 where `run` has those of the full, the forget and the retain set.
        stops: Whether a stopping rule keeps a copy of the trained weights.
        relative_step: As in `UnlearningConfig`.
    """

    constraint: str = "energy_ridge"
    fisher: bool = False
    optim: str = "sgd"
    processes: int = 1
    sharding: str = "none"
    place: str = "device"
    max_memory: int | None = None
    sharded_before: bool = False
    sets: int = 3
    stops: bool = True
    relative_step: bool = True


@dataclass(frozen=True)
class Memory:
    """Bytes on the device of one process: what each kind of tensor takes, and the peak of each phase."""

    parts: Mapping[str, int]
    phases: Mapping[str, int]

    @property
    def peak(self) -> int:
        return max(self.phases.values())


def gram_sizes(trace: Trace) -> list[int]:
    return list(trace.grams.values())


def fisher_sizes(trace: Trace) -> list[int]:
    return [layer.outputs for layer in trace.layers.values()]


def entries(n: int, sketching: Sketching) -> int:
    """Numbers in the sums of n features: `n^2`, or `n (R + 1)` of a sketch. Its decomposition has as many."""
    return n * sketching.columns(n)


def sums_bytes(trace: Trace, fisher: bool) -> int:
    """Float64 sums: `8 I^2` for each Gram, `8 O^2` for each Fisher, less for sketches."""
    sizes = gram_sizes(trace) + (fisher_sizes(trace) if fisher else [])
    return sum(8 * entries(n, trace.sketching) for n in sizes)


def decomposed(trace: Trace, constraint: str) -> list[list[int]]:
    """Sizes of the matrices that a constraint has decomposed, in the order of `bind_constraints`."""
    kind = CONSTRAINTS.find(constraint)
    return [] if kind is None else [gram_sizes(trace)] + [fisher_sizes(trace)] * kind.needs_fisher


def factor_bytes(trace: Trace, constraint: str) -> int:
    """Float32 matrices: at most `4 I^2 * factor_share` bytes for each right factor, `4 O^2` for each left one, `4 I R`
    for a factor of a sketch."""
    kind = CONSTRAINTS.find(constraint)
    if kind is None:
        return 0
    rights = sum(_right_bytes(kind, n, trace.sketching) for n in gram_sizes(trace))
    lefts = sum(4 * entries(n, trace.sketching) for n in fisher_sizes(trace))
    return rights + lefts * kind.needs_fisher


def _right_bytes(kind: type[Constraint], n: int, sketching: Sketching) -> int:
    exact = sketching.columns(n) == n
    return int(4 * n * n * kind.factor_share) if exact else 4 * entries(n, sketching)


def trained_bytes(trace: Trace) -> int:
    """The trained weights once: also what gradients, anchors and each further copy take."""
    return trace.width * sum(prod(shape) for shape in trace.trained)


def optimizer_bytes(trace: Trace, optim: str) -> int:
    """State of the optimizer.

    Raises:
        SettingsError: An optimizer whose state is not known here.
    """
    if optim not in OPTIMIZERS:
        raise SettingsError(f"the state of optim {optim!r} is not known; choose from {', '.join(OPTIMIZERS)}")
    if optim == "adafactor":  # the mean square of each row and of each column
        return sum(4 * (prod(s[:-1]) + prod(s[:-2]) * s[-1]) if len(s) > 1 else 4 * prod(s) for s in trace.trained)
    fixed, copies = OPTIMIZERS[optim]
    if "8bit" in optim:
        small = 8 if "adam" in optim else 4
        return int(sum(n * (fixed if n >= BNB_SMALLEST else small) for n in map(prod, trace.trained)))
    return int(sum(prod(shape) for shape in trace.trained) * (fixed + copies * trace.width))


def decomposition_peak(
    groups: Sequence[Sequence[int]], processes: int = 1, kept: float = 1.0, sketching: Sketching = EXACT
) -> int:
    """Largest bytes beside the sums while `RetainStatistics.decompose` runs on one of P processes.

    A process first has all its own matrices (float64), then replaces one after the other by its vectors (float32);
    LAPACK's `dsyevd` takes the matrix, its copy and twice its size, four matrices in all; the SVD of a sketch as many.
    Of a layer that sees fewer positions than half its features it takes less: this is an upper bound.

    Args:
        kept: Share of the finished vectors that stays on the device.
    """
    held, peak = 0.0, 0.0
    for sizes in groups:
        all_numbers = [entries(n, sketching) for n in sizes]
        waiting = sorted(all_numbers, reverse=True)[::processes] if processes > 1 else all_numbers
        found = 0.0
        left = float(sum(8 * numbers for numbers in waiting))
        for numbers in waiting:
            left -= 8 * numbers
            peak = max(peak, held + left + found + 32 * numbers)
            found += 4 * numbers
        held += kept * sum(4 * numbers for numbers in all_numbers)
        peak = max(peak, held + (4 * max(all_numbers) if processes > 1 else 0))
    return int(peak)


def memory(trace: Trace, settings: Settings) -> Memory:
    """Bytes by kind and phase on the device of one process."""
    P, place = settings.processes, settings.place
    shards = P if settings.sharding == "fsdp2" else 1
    before = shards if settings.sharded_before else 1
    fisher = settings.fisher or needs_fisher(settings.constraint)
    groups = decomposed(trace, settings.constraint)
    kept = {"device": 1.0, "shards": 1 / P, "cpu": 0.0, "disk": 0.0}[place]
    sums, once = sums_bytes(trace, fisher), trained_bytes(trace)
    statistics = int(kept * sums * settings.sets)
    vectors = int(kept * sum(4 * entries(n, trace.sketching) for sizes in groups for n in sizes))
    factors = int(kept * factor_bytes(trace, settings.constraint))
    largest = max((entries(n, trace.sketching) for sizes in groups for n in sizes), default=0)
    gathered = trace.unsharded if shards > 1 else 0
    loaded = trace.weights // before + (gathered if before > 1 else 0)
    anchors, weights = once // shards, trace.weights // shards + gathered
    state = optimizer_bytes(trace, settings.optim) // shards
    copies = once // shards * (1 + settings.stops)
    matrix = max((layer.outputs * layer.inputs for layer in trace.layers.values()), default=0)
    fetched = 4 * largest if place != "device" else 0
    held = weights + copies + statistics + vectors + factors
    gradients = once // shards
    buckets = once if P > 1 and settings.sharding == "none" else 0
    step = gradients + (2 * once // shards if settings.relative_step else 0) + 4 * 4 * matrix // shards + fetched
    passes = trace.training if shards == 1 else trace.activations + gradients
    kind = CONSTRAINTS.find(settings.constraint)
    dense = kind is not None and kind.factor_share == 1.0  # made from the vectors in float64
    binding = 24 * largest * dense + fetched
    phases = {
        "load": loaded,
        "collect": loaded + _collecting(trace, settings, sums, kept),
        "decompose": loaded + statistics + decomposition_peak(groups, P, kept, trace.sketching),
        "bind": loaded + statistics + vectors + factors + max(binding, once // before),
        "train": held + state + buckets + max(passes, step),
    }  # fmt: skip
    parts = {
        "weights": weights, "statistics": statistics, "decompositions": vectors, "constraint": factors,
        "anchors": anchors, "copy to stop at": copies - anchors, "gradients": gradients + buckets, "optimizer": state,
        "activations": trace.activations,
    }  # fmt: skip
    return Memory(parts, phases)


def _collecting(trace: Trace, settings: Settings, sums: int, kept: float) -> int:
    """Bytes beside the weights while statistics are collected: sums, activations, rows of all processes.

    At the end each sum is checked for finite values, which takes one of its size and two masks.
    """
    P = settings.processes
    fisher = settings.fisher or needs_fisher(settings.constraint)
    sizes = gram_sizes(trace) + (fisher_sizes(trace) if fisher else [])
    largest = max(entries(n, trace.sketching) for n in sizes)
    shards = P if settings.place == "shards" else 1
    passing = max(trace.collecting, 10 * largest // shards)
    others = int(kept * sums * (settings.sets > 1))  # those of the full set, while the forget set's are collected
    if settings.place == "shards" and P > 1:
        rows = max(16 * P * trace.positions[key] * n for key, n in trace.grams.items())
        return others + sums // P + max(trace.collecting + rows, passing)
    own = sums if settings.max_memory is None else min(sums, settings.max_memory)
    finished = 0 if settings.place in ("cpu", "disk") or settings.max_memory is None else sums - own
    return others + own + finished + passing


@dataclass(frozen=True)
class Work:
    """What a request is made of.

    Attributes:
        rows, forget_rows: Rows to collect on, and to forget.
        batch_size: Rows of a batch on each process, when collecting and training.
        steps: Optimizer steps.
        tflops, tflops64: 10^12 operations a second in the precision of the weights and in float64.
        bandwidth, interconnect: 10^9 bytes a second of device memory, and from and to other processes.
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
    """Operations of all processes together and seconds."""

    flops: float
    seconds: float


def product_flops(trace: Trace, fisher: bool, place: str) -> float:
    """Float64 operations of the sums of one batch: `2 N I^2` for each Gram, `2 N O^2` for each Fisher, less what lies
    below the diagonal of wide ones that are not in shards; `2 N I R` for a sketch."""

    def one(rows: int, n: int) -> float:
        if trace.sketching.columns(n) < n:
            return 2.0 * rows * entries(n, trace.sketching)
        return 2.0 * rows * n * n * (1.0 if place == "shards" else products_share(n))

    grams = sum(one(trace.positions[key], n) for key, n in trace.grams.items())
    fishers = sum(one(trace.positions[layer.gram], layer.outputs) for layer in trace.layers.values())
    return grams + fishers * fisher


def decompose_cost(sizes: Sequence[int], sketching: Sketching = EXACT) -> tuple[float, float]:
    """Float64 operations and bytes of `eigh`: `9 n^3`, and `8/3 n^3` bytes read while it becomes tridiagonal.

    Householder reduction 4/3 n^3 (half of it matrix times vector, which reads what is left of the matrix each time),
    divide and conquer up to 8/3 n^3 twice, transformation back 2 n^3: Golub and Van Loan, section 8.3 and 8.5. Of a
    sketch the core's `eigh`, and an SVD of `n x R`: `8 n R^2` for the products and the QR, `22 R^3` (section 8.6).
    """
    exact = [n for n in sizes if sketching.columns(n) == n]
    thin, rank = [n for n in sizes if sketching.columns(n) < n], sketching.rank
    operations = sum(9.0 * n**3 for n in exact) + sum(8.0 * n * rank**2 + 31.0 * rank**3 for n in thin)
    return operations, sum(8 / 3 * n**3 for n in exact) + len(thin) * 8 * rank**3


def constraint_flops(trace: Trace, constraint: str) -> float:
    """Operations of one step's constraint: `2 O I^2` at most for each application of a right factor, of which anchored
    constraints make two (gradient and move), and `2 O^2 I` for a left one; with a sketch `4 O I R`, `4 O R I`."""
    kind, total = CONSTRAINTS.find(constraint), 0.0
    if kind is None:
        return total
    for layer in trace.layers.values():
        right = layer.outputs * _applied(layer.inputs, trace.sketching)
        left = layer.inputs * _applied(layer.outputs, trace.sketching)
        total += right * (1 + kind.anchored) + left * kind.needs_fisher
    return total


def _applied(n: int, sketching: Sketching) -> float:
    return (2.0 if sketching.columns(n) == n else 4.0) * entries(n, sketching)


def times(trace: Trace, settings: Settings, work: Work) -> dict[str, Phase]:
    """Operations and seconds of collecting, decomposing, one step, and the whole request.

    Without evaluations, and without the forward pass by which single rows stop.
    """
    P = settings.processes
    fisher = settings.fisher or needs_fisher(settings.constraint)
    batches = -(-work.rows // work.batch_size) + -(-work.forget_rows // work.batch_size)
    rate, rate64 = work.tflops * 1e12, work.tflops64 * 1e12
    passes = 1 if settings.max_memory is None else -(-sums_bytes(trace, fisher) // settings.max_memory)
    forward, products = batches * passes * trace.collected, batches * product_flops(trace, fisher, settings.place)
    collect = Phase(forward + products, (forward / rate + products / rate64) / P)
    sizes = [n for group in decomposed(trace, settings.constraint) for n in group]
    operations, read = decompose_cost(sizes, trace.sketching)
    decompose = Phase(operations, (operations / rate64 + read / (work.bandwidth * 1e9)) / min(P, max(len(sizes), 1)))
    constraint = constraint_flops(trace, settings.constraint)
    sharded = settings.sharding == "fsdp2"
    training = P * (trace.forward + trace.backward)
    whole = training + constraint * (1 if sharded else P)
    moved = sum(communication(trace, settings).values())
    copies = 12 * trained_bytes(trace) / (P if sharded else 1)
    seconds = whole / P / rate + copies / (work.bandwidth * 1e9) + moved / (work.interconnect * 1e9)
    step = Phase(whole, seconds)
    request = Phase(
        collect.flops + decompose.flops + work.steps * step.flops,
        collect.seconds + decompose.seconds + work.steps * step.seconds,
    )
    return {"collect": collect, "decompose": decompose, "step": step, "request": request}


def communication(trace: Trace, settings: Settings) -> dict[str, float]:
    """Bytes that one process receives in one optimizer step of one micro-batch.

    FSDP2 gathers the weights for the forward and for the backward pass and sums the gradients of trained ones, each
    `(P - 1) / P` of the tensor; DDP sums gradients in a ring, twice that. An all-to-all moves `(P - 1) / P` of a
    process's share. An anchored constraint needs one for each direction of gradient and of move where the weight
    lies as `[I, O]`; a two-sided one needs one each way on one of its sides. Matrices in shards are gathered at each
    use: for an anchored constraint twice a weight and once more where the leak is logged, for the others once.
    """
    P, kind = settings.processes, CONSTRAINTS.find(settings.constraint)
    share = (P - 1) / P
    once = trained_bytes(trace)
    trained = [layer for layer in trace.layers.values() if layer.trained]
    found = {"weights": 0.0, "gradients": 2 * share * once, "constraint": 0.0, "matrices": 0.0}
    if settings.sharding == "fsdp2":
        found["weights"], found["gradients"] = 2 * share * trace.weights, share * once
        for layer in trained:
            size = share * trace.width * layer.outputs * layer.inputs / P
            found["constraint"] += size * _exchanges(kind, layer.transposed)
    if settings.place == "shards" and kind is not None:
        for layer in trained:
            own = _right_bytes(kind, layer.inputs, trace.sketching)
            own += 4 * entries(layer.outputs, trace.sketching) * kind.needs_fisher
            found["matrices"] += share * (3 if kind.anchored else 1) * own
    return found if P > 1 else dict.fromkeys(found, 0.0)


def _exchanges(kind: type[Constraint] | None, transposed: bool) -> int:
    """All-to-alls of one weight in one step: one each way where a factor acts on the dimension that is sharded."""
    if kind is None:
        return 0
    if kind.needs_fisher:
        return 2
    return (4 if kind.anchored else 2) if transposed else 0


def candidates(settings: Settings, processes: int) -> Iterator[Settings]:
    """Settings for P processes, the fastest first."""
    own = replace(settings, processes=processes)
    shardings = [("none", False)] + [("fsdp2", False), ("fsdp2", True)] * (processes > 1)
    for sharding, before in shardings:
        for place in ("device", *(("shards",) if processes > 1 else ()), "cpu"):
            yield replace(own, sharding=sharding, place=place, sharded_before=before)


def fitting(trace: Trace, settings: Settings, processes: int, room: int) -> tuple[Settings, Memory] | None:
    """The fastest settings for P processes whose peaks are within nine tenths of `room` bytes; None without any.

    A tenth is left for what the allocator cannot hand out and the libraries keep.
    """
    room = int(SHARE * room)
    fisher = settings.fisher or needs_fisher(settings.constraint)
    sizes = gram_sizes(trace) + (fisher_sizes(trace) if fisher else [])
    widest = max((8 * entries(n, trace.sketching) for n in sizes), default=0)
    for own in candidates(settings, processes):
        found = memory(trace, own)
        if found.peak > room and own.place == "cpu":  # unfinished sums are what can still be made smaller
            base = found.phases["collect"] - sums_bytes(trace, fisher)
            limit = (room - base) // 10**8 * 10**8
            if limit >= widest:
                own = replace(own, max_memory=int(limit))
                found = memory(trace, own)
        if found.peak <= room:
            return own, found
    return None


def dtype_of(name: str) -> torch.dtype:
    """`float32` or `bfloat16`."""
    if name not in ("float32", "bfloat16"):
        raise SettingsError(f"dtype must be float32 or bfloat16, got {name!r}")
    return getattr(torch, name)
