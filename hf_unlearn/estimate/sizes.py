"""Sizes of a model and of a deletion request: settings, and the bytes of sums, matrices and optimizer state.

Shapes: I inputs and O outputs of a layer, R columns of a sketch, P processes. What a constraint costs is read from its
class: `needs_fisher`, `factor_share` and `anchored`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from hf_unlearn.constraints.base import Constraint
from hf_unlearn.constraints.registry import CONSTRAINTS, needs_fisher
from hf_unlearn.core.text import ShortRepr
from hf_unlearn.errors import SettingsError
from hf_unlearn.statistics.sketch import EXACT, Sketching

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
"""Optimizer state for each trained number: bytes, and copies in the precision of the weight. The 8-bit states of
bitsandbytes have a float32 scale for each block of 256; its tensors below 4096 numbers are kept in float32."""
BNB_SMALLEST = 4096


@dataclass(frozen=True)
class LayerSize:
    """Sizes of a covered layer.

    Attributes:
        outputs: Number of outputs O.
        inputs: Number of inputs I.
        gram: Name of its Gram.
        transposed: Whether the weight is stored as `[I, O]`.
        trained: Whether the weight is trained.
    """

    outputs: int
    inputs: int
    gram: str
    transposed: bool
    trained: bool


@dataclass(frozen=True, repr=False)
class Trace(ShortRepr):
    """Sizes of a model, and bytes and floating-point operations of one batch on one process.

    Attributes:
        parameters: Number of parameters.
        weights: Bytes of parameters and buffers.
        largest: Bytes of the largest parameter.
        layers: The covered layers by name.
        trained: Shapes of the trained parameters (for LoRA the factors A and B).
        width: Bytes of one trained number.
        positions: Number of rows N of the layer inputs `X_NI` in one batch, by Gram.
        unsharded: Bytes that FSDP2 has gathered at a time: what is outside the blocks, and two blocks.
        collecting: Largest bytes besides weights and sums while a batch is collected.
        training: Largest bytes besides weights in the forward and backward pass, gradients included.
        activations: The same without gradients of weights.
        forward: Operations of the forward pass of a training batch, attention included.
        backward: Operations of its backward pass.
        collected: Operations of a collected batch without the products of the sums.
        sketching: Which sums are sketches; nothing that is traced depends on it.
    """

    parameters: int
    weights: int
    largest: int
    layers: Mapping[str, LayerSize]
    trained: Sequence[torch.Size]
    width: int
    positions: Mapping[str, int]
    unsharded: int
    collecting: int
    training: int
    activations: int
    forward: float
    backward: float
    collected: float
    sketching: Sketching = EXACT

    @property
    def grams(self) -> dict[str, int]:
        """Width I of each Gram."""
        return {layer.gram: layer.inputs for layer in self.layers.values()}


@dataclass(frozen=True)
class EstimateSettings:
    """The settings of a request that its memory and time depend on.

    Attributes:
        constraint: Name of the constraint.
        fisher: Whether to collect Fishers although the constraint does not need them.
        optim: A name in `OPTIMIZERS`.
        processes: Number of processes P.
        sharding: `none` (one process, DDP) or `fsdp2`.
        place: As `keep_statistics_on`: `device`, `cpu`, `disk` or `shards`.
        max_memory: Largest size of unfinished sums in bytes, or None.
        sharded_before: Whether the model is in FSDP2's shards before collecting and training. This takes a program
            of your own; the commands load the complete model on each process.
        sets: Number of statistics held: 1, or 3 where `run` has those of the full, the forget and the retain set.
        stops: Whether a stopping rule keeps a copy of the trained weights.
        relative_step: As in `UnlearningConfig`.
    """

    constraint: str
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

    @property
    def constraint_class(self) -> type[Constraint] | None:
        """Class of the constraint; None without one. Raises `SettingsError` if the name is unknown."""
        return CONSTRAINTS.find(self.constraint)

    @property
    def has_fishers(self) -> bool:
        """Whether the statistics have Fishers."""
        return self.fisher or needs_fisher(self.constraint)


def gram_sizes(trace: Trace) -> list[int]:
    """Return the number of features I of each Gram."""
    return list(trace.grams.values())


def fisher_sizes(trace: Trace) -> list[int]:
    """Return the number of outputs O of each Fisher."""
    return [layer.outputs for layer in trace.layers.values()]


def sum_sizes(trace: Trace, fisher: bool) -> list[int]:
    """Return the number of features of each sum: of the Grams and, if `fisher`, of the Fishers."""
    return gram_sizes(trace) + (fisher_sizes(trace) if fisher else [])


def entries(n: int, sketching: Sketching) -> int:
    """Return how many numbers the sum of n features has: `n^2`, or `n (R + 1)` for a sketch.

    Its decomposition has as many.
    """
    return n * sketching.columns(n)


def is_exact(n: int, sketching: Sketching) -> bool:
    """Whether the sum of n features is a complete matrix rather than a sketch."""
    return sketching.columns(n) == n


def sums_bytes(trace: Trace, fisher: bool) -> int:
    """Return the bytes of the float64 sums: `8 I^2` for each Gram, `8 O^2` for each Fisher, less for sketches."""
    return sum(8 * entries(n, trace.sketching) for n in sum_sizes(trace, fisher))


def decomposed_sizes(trace: Trace, constraint: type[Constraint] | None) -> list[list[int]]:
    """Return the sizes of the matrices that a constraint has decomposed, in the order of `bind_constraints`."""
    if constraint is None:
        return []
    return [gram_sizes(trace)] + [fisher_sizes(trace)] * constraint.needs_fisher


def factor_bytes(trace: Trace, constraint: type[Constraint] | None) -> int:
    """Return the bytes of the float32 matrices of a constraint.

    A right factor takes at most `4 I^2 * factor_share` bytes, a left one `4 O^2`, a factor of a sketch `4 I R`.
    """
    if constraint is None:
        return 0
    rights = sum(right_factor_bytes(constraint, n, trace.sketching) for n in gram_sizes(trace))
    lefts = sum(4 * entries(n, trace.sketching) for n in fisher_sizes(trace))
    return rights + lefts * constraint.needs_fisher


def right_factor_bytes(constraint: type[Constraint], n: int, sketching: Sketching) -> int:
    """Return the bytes of one right factor of n features, at most."""
    return int(4 * n * n * constraint.factor_share) if is_exact(n, sketching) else 4 * entries(n, sketching)


def trained_bytes(trace: Trace) -> int:
    """Return the bytes of the trained weights, which gradients, anchors and each further copy take again."""
    return trace.width * sum(prod(shape) for shape in trace.trained)


def optimizer_bytes(trace: Trace, optim: str) -> int:
    """Return the bytes of the optimizer state.

    Raises:
        SettingsError: The state of this optimizer is not known.
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
