"""Bootstrap intervals."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import mannwhitneyu

RESAMPLES = 1000
BATCH = 100  # resamples held in memory at a time


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% percentile bootstrap interval (None where it has none) and the number of rows behind it."""

    value: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Undefined(Estimate):
    """A quantity that has no value here, and why; it is NaN, never zero."""

    reason: str


def undefined(reason: str, n: int = 0) -> Undefined:
    """The estimate of what cannot be said."""
    return Undefined(math.nan, None, None, n, reason)


def bootstrap_mean(values: ArrayLike, seed: int = 0) -> Estimate:
    """Mean over rows. A constant sample has an interval of zero width."""
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        return undefined("there are no rows")
    mean = float(values.mean())
    if np.ptp(values) == 0:
        return Estimate(mean, mean, mean, len(values))
    return bootstrap((values,), np.mean, seed)


def auc(members: ArrayLike, others: ArrayLike, axis: int = -1) -> Any:
    """Probability that a member scores above a non-member, ties counting half (Mann-Whitney U / (n m))."""
    members, others = np.asarray(members), np.asarray(others)
    statistic = mannwhitneyu(members, others, axis=axis, method="asymptotic").statistic
    return statistic / (members.shape[axis] * others.shape[axis])


def bootstrap_auc(members: ArrayLike, others: ArrayLike, seed: int = 0) -> Estimate:
    """Area under the ROC curve of scores of members (expected higher) against non-members."""
    return bootstrap((members, others), auc, seed)


def bootstrap(samples: Sequence[ArrayLike], statistic: Callable[..., Any], seed: int = 0) -> Estimate:
    """`statistic(*samples, axis=-1)` with its interval; each sample's rows are drawn independently of the others'.

    Args:
        samples: `[N]` each, or `[K, N]` for K numbers of the same row, which are drawn together.
        statistic: Reduces the last axis, whatever axes come before it.
        seed: Of the draws.
    """
    # not scipy.stats.bootstrap: it refuses samples of one row, and a request may be to forget a single one
    arrays = [np.asarray(sample, dtype=np.float64) for sample in samples]
    n = sum(array.shape[-1] for array in arrays)
    if not all(array.shape[-1] for array in arrays):
        return undefined("there are no rows", n)
    if broken := sum(int(np.isnan(array).sum()) for array in arrays):
        return undefined(f"{broken} of its rows' numbers are NaN: the model's weights are broken", n)
    value = float(statistic(*arrays, axis=-1))
    if not all(np.isfinite(array).all() for array in arrays):
        return Estimate(value, None, None, n)
    rng, found = np.random.default_rng(seed), []
    for _ in range(RESAMPLES // BATCH):
        drawn = [array[..., rng.integers(array.shape[-1], size=(BATCH, array.shape[-1]))] for array in arrays]
        found.append(statistic(*drawn, axis=-1))
    drawn_values = np.concatenate(found)
    if not np.isfinite(drawn_values).all():  # a resample in which the statistic is undefined
        return Estimate(value, None, None, n)
    low, high = np.percentile(drawn_values, [2.5, 97.5])
    return Estimate(value, float(low), float(high), n)
