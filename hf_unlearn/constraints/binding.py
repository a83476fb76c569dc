"""Binding constraints to statistics: from a description and the spectra to one linear map per layer."""

import warnings
from collections.abc import Mapping

import torch

from hf_unlearn.constraints.base import BoundConstraint, Constraint, ConstraintLike
from hf_unlearn.constraints.factors import Factor
from hf_unlearn.constraints.registry import constraint_for
from hf_unlearn.errors import StatisticsError
from hf_unlearn.statistics.eigen import Eigen
from hf_unlearn.statistics.retain_statistics import RetainStatistics

MAX_NEGATIVE_SHARE = 1e-6
"""Largest share of negative energy without a warning. Rounding leaves about 1e-16 of float64 sums, and about 1e-7 where
float32 forward passes of the same rows were batched differently; rows that were never added leave percents."""


def resolve_constraints(statistics: RetainStatistics, constraint: ConstraintLike) -> dict[str, Constraint | None]:
    """Return the constraint of each layer, resolved from the spectra of all layers that have the same one.

    Raises:
        SettingsError: No pattern matches a layer.
    """
    requested = {name: constraint_for(name, constraint) for name in statistics.layers}
    resolved: dict[Constraint | None, Constraint | None] = {None: None}
    for different in dict.fromkeys(requested.values()):  # in the same order on every process
        if different is not None:
            layers = [name for name, asked in requested.items() if asked == different]
            resolved[different] = different.resolve([statistics.gram_eigen(name) for name in layers])
    return {name: resolved[asked] for name, asked in requested.items()}


def bind_constraints(
    statistics: RetainStatistics, constraint: ConstraintLike, device: torch.device | str = "cpu"
) -> dict[str, BoundConstraint]:
    """Decompose the statistics and return the bound constraint of each layer that has one.

    Layers that share a Gram share its decomposition and its factor. Negative energy, which only the subtraction of
    foreign rows leaves, is clamped to zero, with one warning that says how much there was and where.

    >>> import torch
    >>> from hf_unlearn.constraints import RidgeConstraint, bind_constraints
    >>> from hf_unlearn.statistics.retain_statistics import LayerSums, RetainStatistics
    >>> statistics = RetainStatistics(
    ...     gram_sums={"layer": torch.diag(torch.tensor([9.0, 1.0]))}, fisher_sums={},
    ...     layers={"layer": LayerSums("layer", 1, False)}, positions={"layer": 1},
    ...     rows=1, labels=0, weights="", data="",
    ... )
    >>> bound = bind_constraints(statistics, RidgeConstraint(strength=0.2))  # mean eigenvalue 5, so a scale of 1
    >>> bound["layer"](torch.ones(1, 2))
    tensor([[0.1000, 0.5000]])

    Args:
        statistics: Statistics of the retain set.
        constraint: One constraint, None, or a mapping from layer name patterns to either.
        device: Where factors are computed; they are kept where the statistics are (`RetainStatistics.storage`).

    Raises:
        StatisticsError: A two-sided constraint without a Fisher in the statistics, or statistics of no row.
        SettingsError: No pattern matches a layer.
    """
    requested = {name: constraint_for(name, constraint) for name in statistics.layers}
    if statistics.rows == 0 and any(requested.values()):
        raise StatisticsError("the statistics have no row left (everything was subtracted); nothing to protect")
    statistics.decompose([name for name, asked in requested.items() if asked is not None], device=device)
    resolved = {
        name: chosen for name, chosen in resolve_constraints(statistics, constraint).items() if chosen is not None
    }
    two_sided = [name for name, chosen in resolved.items() if chosen.needs_fisher]
    statistics.decompose(two_sided, fisher=True, device=device)
    warned = _SpectrumWarnings()
    rights: dict[tuple[str, Constraint], Factor] = {}
    bound = {}
    for name, chosen in resolved.items():
        gram_name = statistics.layers[name].inputs
        if (gram_name, chosen) not in rights:
            gram = statistics.gram_eigen(name)
            warned.check(gram_name, gram, chosen)
            rights[gram_name, chosen] = chosen.right(gram.to(device)).kept_in(statistics.storage)
        left: Factor | None = None
        if chosen.needs_fisher:
            fisher = statistics.fisher_eigen(name)
            warned.check(f"{name} (Fisher)", fisher, chosen)
            left = chosen.left(fisher.to(device))
            left = left and left.kept_in(statistics.storage)
        bound[name] = BoundConstraint(rights[gram_name, chosen], left, chosen.anchored)
    _warn_of_negative_energy(warned.negative_shares)
    _warn_of_shortfalls(warned.shortfalls)
    return bound


class _SpectrumWarnings:
    """What is wrong with the spectra that were used, by the name of the matrix."""

    def __init__(self) -> None:
        self.negative_shares: dict[str, float] = {}
        self.shortfalls: dict[str, str] = {}

    def check(self, name: str, matrix: Eigen, constraint: Constraint) -> None:
        self.negative_shares[name] = matrix.negative_share
        if (shortfall := constraint.sketch_shortfall(matrix)) is not None:
            self.shortfalls[name] = shortfall


def _warn_of_negative_energy(shares: Mapping[str, float]) -> None:
    worst = max(shares, key=lambda name: shares[name], default=None)
    if worst is not None and shares[worst] > MAX_NEGATIVE_SHARE:
        warnings.warn(
            f"{shares[worst]:.2%} of the energy of {worst} is negative after the subtraction (clamped to zero); check "
            "that the subtracted rows were part of the data and were collected on the same weights",
            stacklevel=3,
        )


def _warn_of_shortfalls(shortfalls: Mapping[str, str]) -> None:
    for name, reason in list(shortfalls.items())[:1]:
        more = f" (and {len(shortfalls) - 1} more)" if len(shortfalls) > 1 else ""
        warnings.warn(
            f"the sketch of {name}{more} {reason}; collect with a larger sketch_rank, or with a sketch_above that "
            "keeps it exact",
            stacklevel=3,
        )
