"""Laws of the intervals: each covers, narrows with n and repeats by seed. Each law has a negative control."""

from __future__ import annotations

import math
from dataclasses import astuple
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from helpers import reference_losses as reference
from helpers.tiny import CASES, collate, sharpen, tiny_bert
from hf_unlearn.data.batches import PaddingCollator
from hf_unlearn.evaluation.metrics.intervals import Estimate, Undefined, auc, bootstrap, bootstrap_auc, bootstrap_mean
from hf_unlearn.evaluation.row_scores import score_rows


def samples(n: int, seed: int, mean: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1.0, n)


def width(estimate: Estimate) -> float:
    return estimate.high - estimate.low


def test_the_interval_of_a_mean_covers_it_about_95_times_in_100() -> None:
    result = [bootstrap_mean(samples(40, seed), seed) for seed in range(150)]
    share = np.mean([e.low <= 1.0 <= e.high for e in result])
    assert 0.89 <= share <= 0.99
    assert np.mean([e.low <= 1.5 <= e.high for e in result]) < 0.5


@given(st.integers(2, 60), st.integers(0, 1000))
@example(3, 984)  # the mean of three times the largest value is rounded to just above it
@settings(max_examples=10, deadline=None)
def test_a_mean_lies_in_its_interval_and_its_interval_in_the_data(n: int, seed: int) -> None:
    values = samples(n, seed)
    result = bootstrap_mean(values)
    assert result.value == pytest.approx(values.mean()) and result.n == n
    ulp = 1e-15 * np.abs(values).max()
    assert values.min() - ulp <= result.low <= result.value <= result.high <= values.max() + ulp


def test_the_interval_of_a_mean_narrows_as_one_over_root_n() -> None:
    widths = [np.mean([width(bootstrap_mean(samples(n, seed))) for seed in range(5)]) for n in (25, 400)]
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.2)


def test_intervals_are_a_function_of_the_seed() -> None:
    values = samples(30, 0)
    assert bootstrap_mean(values, 3) == bootstrap_mean(values, 3)
    assert bootstrap_mean(values, 3) != bootstrap_mean(values, 4)
    others = samples(20, 1, 0.5)
    assert bootstrap_auc(values, others, 3) == bootstrap_auc(values, others, 3)
    assert bootstrap_auc(values, others, 3) != bootstrap_auc(values, others, 4)


def test_intervals_leave_the_global_random_state_alone() -> None:
    np.random.seed(0)
    expected = np.random.rand()
    np.random.seed(0)
    bootstrap_mean(samples(9, 0))
    assert np.random.rand() == expected


@pytest.mark.parametrize("values", [[0.25], [0.25] * 9, np.full(4, 7.0, np.float32), [1, 1, 1]])
def test_a_constant_sample_has_an_interval_of_zero_width(values: Any) -> None:
    assert astuple(bootstrap_mean(values)) == (values[0], values[0], values[0], len(values))
    assert width(bootstrap_mean([*values, 8.0])) > 0


def test_intervals_agree_with_scipys_percentile_bootstrap() -> None:
    values, others = samples(60, 0), samples(50, 1, 0.3)
    for result, data, statistic in (
        (bootstrap_mean(values), (values,), lambda v, axis: v.mean(axis=axis)),
        (bootstrap_auc(values, others), (values, others), auc),
    ):
        twin = scipy.stats.bootstrap(data, statistic, method="percentile", n_resamples=1000, rng=1).confidence_interval
        assert result.low == pytest.approx(twin.low, abs=0.15 * width(result))
        assert result.high == pytest.approx(twin.high, abs=0.15 * width(result))
        assert width(result) > 0.05


def test_an_empty_sample_is_undefined_instead_of_zero_and_nan_stays_nan() -> None:
    assert isinstance(bootstrap_mean([]), Undefined) and "no rows" in bootstrap_mean([]).reason
    result = bootstrap_mean([0.5, math.nan])
    assert math.isnan(result.value) and result.low is None
    area = bootstrap_auc([1.0, math.nan], [0.0, 1.0])
    assert math.isnan(area.value) and area.low is None
    assert isinstance(bootstrap_auc([], [1.0]), Undefined)


def test_rows_of_paired_numbers_are_drawn_together() -> None:
    """The difference of two numbers of the same row has no spread where it is constant; drawn apart it would have."""
    values = samples(30, 0)
    pairs = np.stack([values + 2, values])
    together = bootstrap([pairs], lambda p, axis: (p[0] - p[1]).mean(axis=axis))
    apart = bootstrap(list(pairs), lambda a, b, axis: a.mean(axis=axis) - b.mean(axis=axis))
    assert width(together) < 1e-9 and width(apart) > 0.3 and together.n == 30 and apart.n == 60


# Area under the curve


@given(st.lists(st.integers(0, 6), min_size=1, max_size=12), st.lists(st.integers(0, 6), min_size=1, max_size=12))
@settings(max_examples=60, deadline=None)
def test_auc_equals_sklearns_and_the_share_of_pairs_with_ties_as_halves(members: list[int], others: list[int]) -> None:
    truth = [1] * len(members) + [0] * len(others)
    result = float(auc(members, others))
    assert result == pytest.approx(roc_auc_score(truth, members + others))
    assert result == pytest.approx(reference.auc(np.array(members), np.array(others)))
    assert result == pytest.approx(1 - float(auc(others, members)))


def test_negative_control_ties_that_count_nothing_give_another_area() -> None:
    members, others = [1, 2, 2], [2, 2, 0]
    strict = np.mean([m > o for m in members for o in others])
    assert abs(float(auc(members, others)) - strict) > 0.1


def test_auc_is_a_half_for_one_distribution_and_one_for_separated_ones() -> None:
    same = bootstrap_auc(samples(300, 0), samples(300, 1))
    assert same.low <= 0.5 <= same.high and abs(same.value - 0.5) < 0.06 and same.n == 600
    assert astuple(bootstrap_auc([3.0, 4.0, 5.0], [0.0, 1.0])) == (1, 1, 1, 5)
    assert astuple(bootstrap_auc([0.0, 1.0], [3.0, 4.0, 5.0])) == (0, 0, 0, 5)
    assert astuple(bootstrap_auc([2.0, 2.0], [2.0, 2.0])) == (0.5, 0.5, 0.5, 4)
    shifted = bootstrap_auc(samples(300, 0, 2.0), samples(300, 1, 1.0))
    assert shifted.low > 0.6 and shifted.value == pytest.approx(scipy.stats.norm.cdf(1 / math.sqrt(2)), abs=0.05)


def test_the_interval_of_an_area_covers_it_about_95_times_in_100() -> None:
    truth = scipy.stats.norm.cdf(0.5 / math.sqrt(2))
    result = [bootstrap_auc(samples(30, seed, 0.5), samples(30, 1000 + seed, 0.0), seed) for seed in range(40)]
    assert np.mean([e.low <= truth <= e.high for e in result]) >= 0.85
    assert np.mean([e.low <= 0.95 <= e.high for e in result]) < 0.3


def test_one_forgotten_row_has_an_area_and_an_interval_from_the_others() -> None:
    others = np.arange(10.0)
    result = bootstrap_auc([6.5], others)
    assert result.value == pytest.approx(0.7) and result.low < 0.7 < result.high and result.n == 11
    assert astuple(bootstrap_auc([2.0], [1.0])) == (1, 1, 1, 2)


def test_membership_shows_in_a_model_that_learnt_its_rows() -> None:
    model = sharpen(tiny_bert(), 2.0)
    rows = CASES["bert"][1](20)
    with torch.no_grad():
        best = model(**collate([{k: v for k, v in r.items() if k != "labels"} for r in rows])).logits.argmax(-1)
    members = [row | {"labels": int(label)} for row, label in zip(rows, best, strict=True)]
    others = [row | {"labels": (int(label) + 1) % 5} for row, label in zip(rows, best, strict=True)]
    losses = [score_rows(model, data, PaddingCollator()).loss for data in (members, others)]
    assert bootstrap_auc(-losses[0], -losses[1]).value > 0.8 > 0.2 > bootstrap_auc(losses[0], losses[1]).value
