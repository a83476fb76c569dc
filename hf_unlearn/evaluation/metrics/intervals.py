"""Estimates: a number with its n and 95% bootstrap interval."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import mannwhitneyu

RESAMPLES = 1000
BATCH = 100  # resamples held in memory at a time
NO_RETRAINED = "no retrained model was given"


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% percentile bootstrap interval and the number of rows behind it.

    >>> bootstrap_mean([0.0, 1.0, 1.0, 0.0]).value
    0.5

    Attributes:
        value: The value; NaN if it is undefined.
        low, high: Bounds of the interval, None if there is none.
        n: Number of rows.
    """

    value: float
    low: float | None
    high: float | None
    n: int


@dataclass(frozen=True)
class Undefined(Estimate):
    """An estimate without a value, and the reason; the value is NaN, never zero."""

    reason: str


def undefined(reason: str, n: int = 0) -> Undefined:
    """Return an estimate without a value.

    >>> undefined("no retrained model was given", n=20).value
    nan
    """
    return Undefined(math.nan, None, None, n, reason)


def bootstrap_mean(values: ArrayLike, seed: int = 0) -> Estimate:
    """Estimate the mean over rows. A constant sample has an interval of zero width.

    >>> bootstrap_mean([1.0, 1.0])
    Estimate(value=1.0, low=1.0, high=1.0, n=2)
    """
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        return undefined("there are no rows")
    mean = float(values.mean())
    if np.ptp(values) == 0:
        return Estimate(mean, mean, mean, len(values))
    return bootstrap((values,), np.mean, seed)


def auc(members: ArrayLike, others: ArrayLike, axis: int = -1) -> NDArray:
    """Return the probability that a member scores above a non-member; ties count half (Mann-Whitney U / (n m))."""
    members, others = np.asarray(members), np.asarray(others)
    statistic = mannwhitneyu(members, others, axis=axis, method="asymptotic").statistic
    return statistic / (members.shape[axis] * others.shape[axis])


def bootstrap_auc(members: ArrayLike, others: ArrayLike, seed: int = 0) -> Estimate:
    """Estimate the area under the ROC curve of members' scores (expected to be higher) against non-members' scores.

    >>> bootstrap_auc([2.0, 3.0], [0.0, 1.0]).value
    1.0
    """
    return bootstrap((members, others), auc, seed)


def bootstrap(samples: Sequence[ArrayLike], statistic: Callable[..., NDArray | np.floating], seed: int = 0) -> Estimate:
    """Estimate `statistic(*samples, axis=-1)` with its interval; each sample is resampled independently.

    >>> bootstrap([[1.0, 2.0, 4.0]], np.max)
    Estimate(value=4.0, low=1.0, high=4.0, n=3)

    Args:
        samples: `[N]` each, or `[K, N]` for K numbers per row, which are drawn together.
        statistic: Reduces the last axis, whatever axes come before it.
        seed: Seed of the draws.

    Returns:
        An `Estimate`; without bounds if a sample is infinite or the statistic is not finite on a resample; `Undefined`
        if there are no rows or some are NaN.
    """
    # not scipy.stats.bootstrap: it refuses samples of one row, and a request may be to forget a single one
    arrays = [np.asarray(sample, dtype=np.float64) for sample in samples]
    n = sum(array.shape[-1] for array in arrays)
    if not all(array.shape[-1] for array in arrays):
        return undefined("there are no rows", n)
    if missing := sum(int(np.isnan(array).sum()) for array in arrays):
        return undefined(f"{missing} of its rows' numbers are NaN: the model's weights are broken", n)
    value = float(statistic(*arrays, axis=-1))
    if not all(np.isfinite(array).all() for array in arrays):
        return Estimate(value, None, None, n)
    rng, resampled = np.random.default_rng(seed), []
    for _ in range(RESAMPLES // BATCH):
        drawn = [array[..., rng.integers(array.shape[-1], size=(BATCH, array.shape[-1]))] for array in arrays]
        resampled.append(statistic(*drawn, axis=-1))
    drawn_values = np.concatenate(resampled)
    if not np.isfinite(drawn_values).all():  # the statistic is undefined on a resample
        return Estimate(value, None, None, n)
    low, high = np.percentile(drawn_values, [2.5, 97.5])
    return Estimate(value, float(low), float(high), n)
