"""Bootstrap intervals."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import mannwhitneyu

RESAMPLES = 1000
BATCH = 100  # resamples held in memory at a time


@dataclass(frozen=True)
class Estimate:
    """A value with its 95% percentile bootstrap interval and the number of rows behind it."""

    value: float
    low: float
    high: float
    n: int


def bootstrap_mean(values: ArrayLike, seed: int = 0) -> Estimate:
    """Mean over rows. A constant sample has an interval of zero width."""
    values = np.asarray(values, dtype=np.float64)
    mean = float(values.mean())
    if len(values) < 2 or np.ptp(values) == 0:
        return Estimate(mean, mean, mean, len(values))
    found = _interval((values,), lambda v, axis: v.mean(axis=axis), seed)
    return Estimate(mean, *found, len(values))


def auc(members: ArrayLike, others: ArrayLike, axis: int = -1) -> Any:
    """Probability that a member scores above a non-member, ties counting half (Mann-Whitney U / (n m))."""
    members, others = np.asarray(members), np.asarray(others)
    statistic = mannwhitneyu(members, others, axis=axis, method="asymptotic").statistic
    return statistic / (members.shape[axis] * others.shape[axis])


def bootstrap_auc(members: ArrayLike, others: ArrayLike, seed: int = 0) -> Estimate:
    """Area under the ROC curve of scores of members (expected higher) against non-members."""
    members, others = np.asarray(members, dtype=np.float64), np.asarray(others, dtype=np.float64)
    found = _interval((members, others), auc, seed)
    return Estimate(float(auc(members, others)), *found, len(members) + len(others))


def _interval(samples: tuple, statistic: Callable, seed: int) -> tuple[float, float]:
    # not scipy.stats.bootstrap: it refuses samples of one row, and a request may be to forget a single one
    rng, found = np.random.default_rng(seed), []
    for _ in range(RESAMPLES // BATCH):
        drawn = [sample[rng.integers(len(sample), size=(BATCH, len(sample)))] for sample in samples]
        found.append(statistic(*drawn, axis=-1))
    low, high = np.percentile(np.concatenate(found), [2.5, 97.5])
    return float(low), float(high)
