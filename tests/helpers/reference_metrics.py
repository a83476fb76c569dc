"""Slow twins of the metrics: float64, one row, one pair, one prefix at a time, straight from the papers' formulas.

They work on probabilities where the package works on logarithms, and never call it. `Labels` as in reference_losses.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from helpers import reference_losses as reference
from helpers.reference_losses import Labels, auc, softmax


def extraction_strength(row: Sequence[tuple[NDArray, int]]) -> float:
    """One minus the share of the shortest prefix after which every label is the most probable one."""
    for k in range(len(row)):
        if all(int(np.argmax(z)) == y for z, y in row[k:]):
            return 1 - k / len(row)
    return 0.0


def lowest_mean(values: Sequence[float], share: float = 0.4) -> float:
    count = max(1, math.floor(len(values) * share + 1e-9))
    return sum(sorted(values)[:count]) / count


def min_k(row: Sequence[tuple[NDArray, int]]) -> float:
    return -lowest_mean([float(np.log(softmax(z)[y])) for z, y in row])


def min_k_plus_plus(row: Sequence[tuple[NDArray, int]]) -> float:
    values = []
    for z, y in row:
        p = softmax(z)
        logs = np.log(p)
        mean = float(sum(p * logs))
        deviation = math.sqrt(max(float(sum(p * (logs - mean) ** 2)), 1e-6))
        values.append((float(logs[y]) - mean) / deviation)
    return -lowest_mean(values)


def row_scores(rows: Labels) -> NDArray:
    """`[B, 7]`, in `RowScores`' order."""
    more = [[extraction_strength(row), min_k(row), min_k_plus_plus(row)] for row in rows]
    return np.concatenate([reference.row_scores(rows), np.array(more)], axis=1)


def truth_ratio(paraphrase: float, wrong: Sequence[float], arithmetic: bool = False) -> float:
    """From the losses of one row."""
    probabilities = [math.exp(-loss) for loss in wrong]
    if arithmetic:
        numerator = sum(probabilities) / len(probabilities)
    else:
        numerator = math.prod(probabilities) ** (1 / len(probabilities))
    return numerator / math.exp(-paraphrase)


def ks_pvalue(left: Sequence[float], right: Sequence[float]) -> float:
    """Exact two-sided p-value by counting all ways to deal the pooled values to the two samples (no ties)."""

    def distance(a: Sequence[float], b: Sequence[float]) -> float:
        places = [*a, *b]
        return max(abs(sum(x <= t for x in a) / len(a) - sum(x <= t for x in b) / len(b)) for t in places)

    pooled, seen = [*left, *right], distance(left, right)
    count = extreme = 0
    for chosen in itertools.combinations(range(len(pooled)), len(left)):
        a = [pooled[i] for i in chosen]
        b = [pooled[i] for i in range(len(pooled)) if i not in chosen]
        count, extreme = count + 1, extreme + (distance(a, b) >= seen - 1e-12)
    return extreme / count


def harmonic(values: Sequence[float]) -> float:
    return 0.0 if 0 in values else len(values) / sum(1 / value for value in values)


def longest_common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    if not left or not right:
        return 0
    if left[-1] == right[-1]:
        return 1 + longest_common_subsequence(left[:-1], right[:-1])
    return max(longest_common_subsequence(left[:-1], right), longest_common_subsequence(left, right[:-1]))


def priv_leak(members: NDArray, others: NDArray, members_retrained: NDArray, others_retrained: NDArray) -> float:
    private, private_retrained = 1 - auc(members, others), 1 - auc(members_retrained, others_retrained)
    return 100 * (private - private_retrained) / private_retrained


def kl(p: Sequence[float], q: Sequence[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def js(p: Sequence[float], q: Sequence[float]) -> float:
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    return kl(p, middle) / 2 + kl(q, middle) / 2
