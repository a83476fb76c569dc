"""Constraints: linear maps from a proposed step of one weight to an allowed one.

Shapes: step_OI is a step of a weight with O outputs and I inputs; basis_IK spans the core gradient space, basis_IM its
complement. Each constraint is a small frozen description; `bind_constraints` turns it and the statistics into one
`BoundConstraint` per layer. A further constraint is one class with `right`, `left`, `needs_fisher`, `anchored`.
"""

import warnings
from collections.abc import Mapping

import torch

from hf_unlearn.constraints.base import BoundConstraint, Constraint, ConstraintLike
from hf_unlearn.constraints.factors import Factor
from hf_unlearn.constraints.registry import constraint_for
from hf_unlearn.errors import StatisticsError
from hf_unlearn.statistics.eigen import (
    Eigen,
)
from hf_unlearn.statistics.retain_statistics import RetainStatistics

NEGATIVE_ENERGY_WARNING = 1e-6
HELD_ENERGY_WARNING = 0.9
"""Share of the trace that a sketch must hold under a soft constraint."""


def resolve_constraints(statistics: RetainStatistics, constraint: ConstraintLike) -> dict[str, Constraint | None]:
    """The constraint of each layer, resolved from the spectra of all layers that share it.

    Raises:
        SettingsError: No pattern matches a layer.
    """
    chosen = {name: constraint_for(name, constraint) for name in statistics.layers}
    resolved: dict[Constraint | None, Constraint | None] = {None: None}
    for kind in dict.fromkeys(chosen.values()):  # in the same order on every process
        if kind is not None:
            resolved[kind] = kind.resolve([statistics.gram_eigen(name) for name in chosen if chosen[name] == kind])
    return {name: resolved[kind] for name, kind in chosen.items()}


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
    chosen = resolve_constraints(statistics, constraint)
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
            _note_shortfall(short, key, parts, kind)
            rights[key, kind] = kind.right(parts.to(device)).kept_in(statistics.storage)
        left: Factor | None = None
        if kind.needs_fisher:
            parts = statistics.fisher_eigen(name)
            grams[f"{name} (Fisher)"] = parts.negative_share
            _note_shortfall(short, f"{name} (Fisher)", parts, kind)
            left = kind.left(parts.to(device))
            left = left and left.kept_in(statistics.storage)
        bound[name] = BoundConstraint(rights[key, kind], left, kind.anchored)
    _warn_negative(grams)
    _warn_short(short)
    return bound


def _warn_negative(shares: Mapping[str, float]) -> None:
    worst = max(shares, key=lambda name: shares[name], default=None)
    if worst is not None and shares[worst] > NEGATIVE_ENERGY_WARNING:
        warnings.warn(
            f"{shares[worst]:.2%} of the energy of {worst} is negative after the subtraction (clamped to zero): were "
            "the subtracted rows part of the data, and collected on the same weights?",
            stacklevel=3,
        )


def _note_shortfall(short: dict[str, str], name: str, matrix: Eigen, constraint: Constraint) -> None:
    if (reason := constraint.sketch_shortfall(matrix)) is not None:
        short[name] = reason


def _warn_short(short: Mapping[str, str]) -> None:
    for name, reason in list(short.items())[:1]:
        more = f" (and {len(short) - 1} more)" if len(short) > 1 else ""
        warnings.warn(
            f"the sketch of {name}{more} {reason}; collect with a larger sketch_rank, or with a sketch_above that "
            "leaves it exact",
            stacklevel=3,
        )
