"""Constraints: linear maps from a proposed step of one weight to an allowed one.

Shapes: step_OI is a step of a weight with O outputs and I inputs; basis_IK spans the core gradient space, basis_IM its
complement. Each constraint is a small frozen description; `bind_constraints` turns it and the statistics into one
`BoundConstraint` per layer. A further constraint is one class with `right`, `left`, `needs_fisher`, `anchored`.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from statistics import median
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from hf_unlearn.errors import SettingsError, StatisticsError, require_numbers
from hf_unlearn.linalg import (
    Eigen,
    Spectrum,
    check_energy,
    eigen,
    numerical_rank,
    participation_share,
    rank_for_energy,
    scale_for_share,
)
from hf_unlearn.placements import apply_right, turned
from hf_unlearn.sharding import whole
from hf_unlearn.statistics import RetainStatistics
from hf_unlearn.storage import Storage, fetch

NEGATIVE_ENERGY_WARNING = 1e-6
HELD_ENERGY_WARNING = 0.9
"""Share of the trace that a sketch must hold under a soft constraint."""
UNSEEN = 2.0**-25
"""Share that a step may lose in a direction without any number in float32 being another."""


class Factor(Protocol):
    """A symmetric matrix, applied from the right: `step_OI -> step_OI @ matrix_II`."""

    def __call__(self, step_OI: Tensor) -> Tensor: ...

    def root(self) -> "Factor":
        """The symmetric square root: applied twice it is this factor; a projection is its own."""
        ...

    def kept_in(self, storage: Storage) -> "Factor":
        """The same, its matrix kept elsewhere between uses."""
        ...


@dataclass(frozen=True, eq=False)
class Remove:
    """`I - U U^T` by the basis of what is removed: `2 O I K` multiply-adds."""

    basis_IK: Tensor

    def __call__(self, step_OI: Tensor) -> Tensor:
        basis_IK = fetch(self.basis_IK, step_OI.device).to(step_OI)
        return torch.addmm(step_OI, step_OI @ basis_IK, basis_IK.T, alpha=-1)

    def root(self) -> Factor:
        return self

    def kept_in(self, storage: Storage) -> Factor:
        return Remove(storage.keep(self.basis_IK))


@dataclass(frozen=True, eq=False)
class Keep:
    """`V V^T` by the basis of what is kept: `2 O I M` multiply-adds."""

    basis_IM: Tensor

    def __call__(self, step_OI: Tensor) -> Tensor:
        basis_IM = fetch(self.basis_IM, step_OI.device).to(step_OI)
        return (step_OI @ basis_IM) @ basis_IM.T

    def root(self) -> Factor:
        return self

    def kept_in(self, storage: Storage) -> Factor:
        return Keep(storage.keep(self.basis_IM))


@dataclass(frozen=True, eq=False)
class Shrink:
    """A dense symmetric matrix: `O I^2` multiply-adds."""

    matrix_II: Tensor

    def __call__(self, step_OI: Tensor) -> Tensor:
        return step_OI @ fetch(self.matrix_II, step_OI.device).to(step_OI)

    def root(self) -> Factor:
        parts = eigen(whole(self.matrix_II))
        return Shrink(((parts.vectors_II * parts.values_I.sqrt()) @ parts.vectors_II.T).float())

    def kept_in(self, storage: Storage) -> Factor:
        return Shrink(storage.keep(self.matrix_II))


@dataclass(frozen=True, eq=False)
class ShrinkThin:
    """`outside I + U diag(scale - outside) U^T` with a thin U: `2 O I K` multiply-adds, and no `I x I` matrix."""

    basis_IK: Tensor
    scale_K: Tensor
    outside: float

    def __call__(self, step_OI: Tensor) -> Tensor:
        basis_IK = fetch(self.basis_IK, step_OI.device).to(step_OI)
        scale_K = self.scale_K.to(step_OI) - self.outside
        return torch.addmm(step_OI, (step_OI @ basis_IK) * scale_K, basis_IK.T, beta=self.outside)

    def root(self) -> Factor:
        return ShrinkThin(self.basis_IK, self.scale_K.sqrt(), self.outside**0.5)

    def kept_in(self, storage: Storage) -> Factor:
        return ShrinkThin(storage.keep(self.basis_IK), self.scale_K, self.outside)


@dataclass(frozen=True, eq=False)
class Scale:
    """A diagonal matrix: `O I` multiplications."""

    scale_I: Tensor

    def __call__(self, step_OI: Tensor) -> Tensor:
        return step_OI * fetch(self.scale_I, step_OI.device).to(step_OI)

    def root(self) -> Factor:
        return Scale(whole(self.scale_I).sqrt())

    def kept_in(self, storage: Storage) -> Factor:
        return Scale(storage.keep(self.scale_I))


@dataclass(frozen=True, eq=False)
class Stack:
    """A factor for each block of a layer: `step_GOI -> step_GOI`."""

    blocks: tuple[Factor, ...]

    def __call__(self, step_OI: Tensor) -> Tensor:
        return torch.stack([block(step) for block, step in zip(self.blocks, step_OI, strict=True)])

    def root(self) -> Factor:
        return Stack(tuple(block.root() for block in self.blocks))

    def kept_in(self, storage: Storage) -> Factor:
        return Stack(tuple(block.kept_in(storage) for block in self.blocks))


def _by_block(parts: Eigen, make: Callable[[Eigen], Factor]) -> Factor:
    """The factor of a Gram, or of each of a stack of them."""
    return make(parts) if parts.values_I.ndim == 1 else Stack(tuple(make(block) for block in parts.blocks()))


class Constraint(Protocol):
    """What `bind_constraints` asks of a constraint."""

    needs_fisher: ClassVar[bool]
    anchored: ClassVar[bool]

    def right(self, gram: Eigen) -> Factor: ...

    def left(self, fisher: Eigen) -> Factor: ...


@dataclass(frozen=True)
class EnergyConstraint:
    """Steps orthogonal to the core gradient space: `D (I - U U^T)`; the seed method's (PGU, WACV 2024, eq. 6).

    Idempotent, so that it is applied to the whole move from the original weights ("anchored"): rounding and the
    optimizer's momentum, preconditioning and weight decay leave nothing behind.
    """

    energy: float = 0.9
    """Share of the spectrum that is protected, in (0, 1]; 1 protects the whole span of the retain inputs."""
    spectrum: Spectrum = "singular_values"
    """What the share is of: "eigenvalues" (retained energy proper) or "singular_values" (the PGU authors' rule)."""
    min_rank_share: float = 0.0
    """Protect at least this share of the input dimensions."""

    needs_fisher: ClassVar[bool] = False
    anchored: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_energy(self.energy, self.spectrum, self.min_rank_share)

    def right(self, gram: Eigen) -> Factor:
        return _by_block(gram, self._projection)

    def rank(self, gram: Eigen) -> int:
        """How many leading directions are protected wholly."""
        return gram.rank(self.energy, self.spectrum, self.min_rank_share)

    def _projection(self, gram: Eigen) -> Factor:
        """The thinner of the two forms of the projection; of a diagonal Gram the columns that are kept.

        Of a sketch the energy is counted against the whole trace. What it has missed is spread evenly, the most that
        singular values can sum to: the rank is rather too large than too small, unless the sketch has no more.
        """
        rank = self.rank(gram)
        if gram.diagonal:
            kept_I = torch.ones_like(gram.values_I, dtype=torch.float32)
            return Scale(kept_I.index_fill(0, gram.vectors_II[:rank], 0.0))
        if gram.missed is not None or 2 * rank <= gram.values_I.numel():
            return Remove(gram.vectors_II[:, :rank].float().contiguous())
        return Keep(gram.vectors_II[:, rank:].float().contiguous())

    def left(self, fisher: Eigen) -> Factor:
        raise AssertionError("the energy constraint is one-sided")


@dataclass(frozen=True)
class RidgeConstraint:
    """The closest step to D with a price on the retain drift: `D (I + gram / (strength * mean_eig(gram)))^-1`.

    Solves `min |D' - D|^2 + tr(D' gram D'^T) / (strength * mean_eig(gram))` (METHOD, section 3).
    """

    strength: float = 0.003
    """Price of drift: smaller protects more. Directions of energy above `strength` times the mean are shrunk."""

    needs_fisher: ClassVar[bool] = False
    anchored: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_positive("strength", self.strength)

    def right(self, gram: Eigen) -> Factor:
        return _by_block(gram, lambda parts: _shrink(parts, _price(parts, self.strength)))

    def left(self, fisher: Eigen) -> Factor:
        raise AssertionError("the ridge constraint is one-sided")


@dataclass(frozen=True)
class EnergyRidgeConstraint(EnergyConstraint):
    """Energy's cut, and ridge's price on what it leaves: `D (I - U U^T) (I + gram / scale)^-1`.

    The scale is found from each Gram, so that the mean factor of the directions that the cut leaves is `free_share`:
    ridge regression's choice by effective degrees of freedom (Hastie, Tibshirani, Friedman, The Elements of Statistical
    Learning, section 3.4.1). Directions that the retain set has nothing in are free, and count: where they alone are as
    many, nothing else moves. A price relative to the mean of the whole spectrum would depend on its top: steps would
    be squeezed into a few directions of one network and be free in those of another.

    A network whose inputs have no leading directions is not cut but has ridge's price, at its default strength: where
    many directions are used alike, the cut takes most of them, and what it leaves is the retain rows' as much as the
    forget rows'. So it is in small language models trained from scratch (median participation ratio 0.17 of the width),
    and not in pretrained ones with a few very large features (SmolLM2-135M 0.013, MiniLM 0.03) or in a small vision
    transformer (0.04). All layers go one way: to cut half of them kept less than either.
    """

    free_share: float = 0.7
    """Mean share that gets through in the directions that are left, in (0, 1]: less protects more; 1 is energy."""
    max_participation: float = 0.1
    """Median participation ratio over layers, as a share of the width, up to which there is a cut; 1 always cuts."""

    anchored: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.free_share <= 1:
            raise SettingsError(f"free_share must be in (0, 1], got {self.free_share}; 1 is energy alone")
        if not 0 < self.max_participation <= 1:
            raise SettingsError(f"max_participation must be in (0, 1], got {self.max_participation}; 1 always cuts")

    def right(self, gram: Eigen) -> Factor:
        return _by_block(gram, self._shrinkage)

    def settled(self, grams: Sequence[Eigen]) -> Constraint:
        """Itself, or ridge where the Grams, one for each layer under this constraint, have no leading directions."""
        shares = [participation_share(block.spectrum_I) for gram in grams for block in gram.blocks()]
        return self if median(shares) <= self.max_participation else RidgeConstraint()

    def _shrinkage(self, gram: Eigen) -> Factor:
        spectrum_I = gram.spectrum_I
        removed, seen, every = self.rank(gram), numerical_rank(spectrum_I), spectrum_I.numel()
        wanted = self.free_share * (every - removed) - (every - seen)  # of the directions that were seen
        if wanted <= 0:
            return _shrink(gram, math.inf, seen)
        return _shrink(gram, scale_for_share(spectrum_I[removed:seen], wanted / max(seen - removed, 1)), removed)


@dataclass(frozen=True)
class KroneckerConstraint:
    """Ridge on both sides: also spares the output directions that the retain predictions depend on.

    `(I + fisher / (strength_out * mean_eig(fisher)))^-1 D (I + gram / (strength_in * mean_eig(gram)))^-1`.
    """

    strength_in: float = 0.003
    """Price of drift on the input side: smaller protects more."""
    strength_out: float = 0.03
    """Price of drift on the output side: smaller protects more."""

    needs_fisher: ClassVar[bool] = True
    anchored: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_positive("strength_in", self.strength_in)
        _check_positive("strength_out", self.strength_out)

    def right(self, gram: Eigen) -> Factor:
        return _by_block(gram, lambda parts: _shrink(parts, _price(parts, self.strength_in)))

    def left(self, fisher: Eigen) -> Factor:
        return _by_block(fisher, lambda parts: _shrink(parts, _price(parts, self.strength_out)))


CONSTRAINTS: dict[str, type | None] = {
    "energy": EnergyConstraint,
    "ridge": RidgeConstraint,
    "energy_ridge": EnergyRidgeConstraint,
    "kronecker": KroneckerConstraint,
    "none": None,
}

ConstraintLike = Constraint | None | Mapping[str, Constraint | None]


@dataclass(frozen=True, eq=False)
class BoundConstraint:
    """A constraint with the factors of one layer: a linear map on steps `[O, I]`, or `[G, O, I]` of G blocks.

    `anchored` constraints are idempotent and hold for the whole move from the original weight; the others are applied
    once to each realised step.
    """

    right: Factor | None
    left: Factor | None
    anchored: bool

    def __call__(self, step_OI: Tensor) -> Tensor:
        allowed_OI = step_OI if self.right is None else apply_right(self.right, step_OI)
        return allowed_OI if self.left is None else turned(apply_right(self.left, turned(allowed_OI)))


def build_constraint(name: str, settings: Mapping[str, Any] | None = None) -> Constraint | None:
    """Constraint by its name in `CONSTRAINTS`.

    Raises:
        SettingsError: Unknown name, unknown setting, or a value that is no number or out of range.
    """
    if name not in CONSTRAINTS:
        raise SettingsError(f"unknown constraint {name!r}; choose from {', '.join(CONSTRAINTS)}")
    kind = CONSTRAINTS[name]
    known = [field.name for field in fields(kind)] if kind else []
    for setting in settings or {}:
        if setting not in known:
            raise SettingsError(f"constraint {name!r} has no setting {setting!r}, only {', '.join(known) or 'none'}")
    require_numbers(f"constraint {name!r}", {n: value for n, value in (settings or {}).items() if n != "spectrum"})
    return kind(**(settings or {})) if kind else None


def constraint_for(layer: str, constraint: ConstraintLike) -> Constraint | None:
    """The constraint of one layer; in a mapping of name patterns the first that matches wins.

    Raises:
        SettingsError: No pattern matches.
    """
    if not isinstance(constraint, Mapping):
        return constraint
    for pattern, chosen in constraint.items():
        if fnmatchcase(layer, pattern):
            return chosen
    raise SettingsError(f"no pattern of the constraint settings matches layer {layer}; add '*' as the last pattern")


def settled_constraints(statistics: RetainStatistics, constraint: ConstraintLike) -> dict[str, Constraint | None]:
    """The constraint of each layer, as the spectra of all that share it settle it.

    Raises:
        SettingsError: No pattern matches a layer.
    """
    chosen = {name: constraint_for(name, constraint) for name in statistics.layers}
    settled: dict[Constraint | None, Constraint] = {}
    for kind in dict.fromkeys(chosen.values()):  # in the same order on every process
        if isinstance(kind, EnergyRidgeConstraint):
            settled[kind] = kind.settled([statistics.gram_eigen(name) for name in chosen if chosen[name] == kind])
    return {name: settled.get(kind, kind) for name, kind in chosen.items()}


def bind_constraints(
    statistics: RetainStatistics, constraint: ConstraintLike, device: torch.device | str = "cpu"
) -> dict[str, BoundConstraint]:
    """Decompose the statistics and return the bound constraint of each layer that has one.

    Factors are computed on `device` and kept where the statistics are (`RetainStatistics.storage`). Layers that share a
    Gram share its decomposition. Negative energy, which only a subtraction of foreign rows leaves, is clamped, with one
    warning that says how much there was and where.

    Raises:
        StatisticsError: A Kronecker constraint without a Fisher in the statistics.
    """
    chosen = {name: constraint_for(name, constraint) for name in statistics.layers}
    if statistics.rows == 0 and any(chosen.values()):
        raise StatisticsError("the statistics have no row left (everything was subtracted); nothing to protect")
    constrained = [name for name, kind in chosen.items() if kind is not None]
    statistics.decompose(constrained, device=device)
    chosen = settled_constraints(statistics, constraint)
    two_sided = [n for n in constrained if (kind := chosen[n]) is not None and kind.needs_fisher]
    statistics.decompose(two_sided, fisher=True, device=device)
    rights: dict[tuple[str, Constraint], Factor] = {}
    grams: dict[str, float] = {}
    short: dict[str, str] = {}
    bound = {}
    for name, kind in chosen.items():
        if kind is None:
            continue
        key = statistics.layers[name].inputs
        if (key, kind) not in rights:
            parts = statistics.gram_eigen(name)
            grams[key] = parts.negative_share
            short |= _shortfall(key, parts, kind)
            rights[key, kind] = kind.right(parts.to(device)).kept_in(statistics.storage)
        left = None
        if kind.needs_fisher:
            parts = statistics.fisher_eigen(name)
            grams[f"{name} (Fisher)"] = parts.negative_share
            short |= _shortfall(f"{name} (Fisher)", parts, kind)
            left = kind.left(parts.to(device)).kept_in(statistics.storage)
        bound[name] = BoundConstraint(rights[key, kind], left, kind.anchored)
    _warn_negative(grams)
    _warn_short(short)
    return bound


def _price(parts: Eigen, strength: float) -> float:
    """`strength * mean_eig(A)`; infinite where A is zero."""
    mean = parts.spectrum_I.mean().item()
    return strength * mean if mean > 0 else math.inf


def _shrink(parts: Eigen, scale: float, removed: int = 0) -> Factor:
    """`(I + A / scale)^-1` from the eigen-decomposition of A; the `removed` leading directions are set to zero.

    Those outside of a sketch's vectors are shrunk by what has been missed in the mean. To let them pass instead would
    make them the bulk of every step: with 5% of the trace there and strength 0.003, the true factor is of the order of
    0.003 / 0.05 and not 1. The mean of their true factors is at least this one (`1 / (1 + x)` is convex).
    """
    scaled_I = parts.values_I / scale
    kept_I = 1 / (1 + scaled_I)
    kept_I[:removed] = 0.0
    if parts.missed is not None:
        outside = 1 / (1 + parts.missed / scale)
        return ShrinkThin(parts.vectors_II.float(), kept_I.float(), outside.item())
    if parts.diagonal:
        return Scale(kept_I.scatter(0, parts.vectors_II, kept_I).float())
    shrunk = max(int((scaled_I > UNSEEN).sum()), removed)
    if 2 * shrunk < len(scaled_I):
        return ShrinkThin(parts.vectors_II[:, :shrunk].float().contiguous(), kept_I[:shrunk].float(), 1.0)
    vectors_II = parts.vectors_II.double()
    matrix_II = (vectors_II * kept_I) @ vectors_II.T
    return Shrink(matrix_II.float())


def _warn_negative(shares: Mapping[str, float]) -> None:
    worst = max(shares, key=lambda name: shares[name], default=None)
    if worst is not None and shares[worst] > NEGATIVE_ENERGY_WARNING:
        warnings.warn(
            f"{shares[worst]:.2%} of the energy of {worst} is negative after the subtraction (clamped to zero): were "
            "the subtracted rows part of the data, and collected on the same weights?",
            stacklevel=3,
        )


def _shortfall(name: str, gram: Eigen, kind: Constraint) -> dict[str, str]:
    """By name what is wrong with a sketch under a constraint: nothing, or in words how much it holds."""
    held = min((1 - block.missed_share for block in gram.blocks()), default=1.0)
    if isinstance(kind, EnergyConstraint):
        asked = (kind.energy, kind.spectrum, kind.min_rank_share)
        reached = all(rank_for_energy(block.spectrum_I, *asked) <= len(block.values_I) for block in gram.blocks())
        asked_for = f"energy {kind.energy} ({kind.spectrum}) may need more directions than it has: all are protected"
    else:
        reached = gram.missed is None or held >= HELD_ENERGY_WARNING
        asked_for = "what it has missed is shrunk evenly"
    return {} if reached else {name: f"holds {held:.1%} of its trace; {asked_for}"}


def _warn_short(short: Mapping[str, str]) -> None:
    for name, reason in list(short.items())[:1]:
        more = f" (and {len(short) - 1} more)" if len(short) > 1 else ""
        warnings.warn(
            f"the sketch of {name}{more} {reason}; collect with a larger sketch_rank, or with a sketch_above that "
            "leaves it exact",
            stacklevel=3,
        )


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise SettingsError(f"{name} must be above 0, got {value}; 1e-4 to 0.3 is the usual range")
