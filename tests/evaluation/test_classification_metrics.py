"""Laws of the classification metrics: by hand, against twins, and undefined without a retrained model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import reference_metrics as reference
from hf_unlearn.evaluation.metrics.classification import (
    ActivationDistance,
    AnamnesisIndex,
    AverageGap,
    EntropyDistance,
    JSDivergence,
    TugOfWar,
    ZeroRetrainForgetting,
    entropy_distance,
    js_divergences,
    relearn_steps,
)
from hf_unlearn.evaluation.metrics.intervals import Undefined

GROUPS = ["forget"] * 4 + ["retain"] * 2 + ["test"] * 2


def distributions(n: int, seed: int, classes: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(classes), n)


def test_average_gap_and_tug_of_war_by_hand() -> None:
    """Accuracies 1/4, 1, 1/2 against 1/2, 1, 1: gaps 1/4, 0, 1/2."""
    mine, other = [1, 0, 0, 0, 1, 1, 1, 0], [1, 1, 0, 0, 1, 1, 1, 1]
    assert AverageGap.estimate(GROUPS, mine, other).value == pytest.approx(0.25)
    assert TugOfWar.estimate(GROUPS, mine, other).value == pytest.approx(0.75 * 1 * 0.5)
    assert AverageGap.estimate(GROUPS, mine, other).n == 8
    assert AverageGap.estimate(GROUPS, mine, mine).value == 0 and TugOfWar.estimate(GROUPS, mine, mine).value == 1


def test_a_gap_counts_in_both_directions() -> None:
    """One accuracy up, one down by as much: the mean difference would be 0, the mean gap is not."""
    assert AverageGap.estimate(["a", "b"], [1, 0], [0, 1]).value == 1
    assert TugOfWar.estimate(["a", "b"], [1, 0], [0, 1]).value == 0


def test_activation_distance_by_hand() -> None:
    """(1, 0) to (0, 1) is the root of two; equal outputs are at 0."""
    result = ActivationDistance.estimate([[1, 0], [0.5, 0.5]], [[0, 1], [0.5, 0.5]])
    assert result.value == pytest.approx(math.sqrt(2) / 2) and result.n == 2


def test_js_divergence_by_hand() -> None:
    """Disjoint outputs are at log 2; (1, 0) to (1/2, 1/2) at half of log(4/3) and of log(2/3)/2 + log(2)/2."""
    assert js_divergences([[1, 0]], [[0, 1]]) == pytest.approx([math.log(2)])
    by_hand = math.log(4 / 3) / 2 + (math.log(2 / 3) / 2 + math.log(2) / 2) / 2
    assert js_divergences([[1, 0]], [[0.5, 0.5]]) == pytest.approx([by_hand])


@given(st.integers(0, 300))
@settings(max_examples=20, deadline=None)
def test_js_divergence_equals_its_twin_and_zrf_is_one_minus_its_mean_over_rows(seed: int) -> None:
    p, q = distributions(6, seed), distributions(6, seed + 1000)
    twin = np.mean([reference.js(a, b) for a, b in zip(p, q, strict=True)])
    assert JSDivergence.estimate(p, q).value == pytest.approx(twin) == pytest.approx(JSDivergence.estimate(q, p).value)
    assert ZeroRetrainForgetting.estimate(p, q).value == pytest.approx(1 - twin)
    assert abs(1 - twin / 5 - ZeroRetrainForgetting.estimate(p, q).value) > 1e-3  # the mean over classes too
    assert JSDivergence.estimate(p, p).value == pytest.approx(0)


def test_entropy_distance_by_hand_and_is_that_of_histograms_in_decades() -> None:
    """Entropies ten times larger are one decade away, in whatever order the rows come."""
    assert EntropyDistance.estimate([0.1, 0.01, 0.001], [0.01, 1.0, 0.1]).value == pytest.approx(1)
    assert EntropyDistance.estimate([0.1, 0.01], [0.01, 0.1]).value == pytest.approx(0)
    assert EntropyDistance.estimate([0.0], [1e-7]).value == 0
    one, other = np.linspace(0.1, 1, 20), np.linspace(0.2, 1.5, 20)
    result = EntropyDistance.estimate(one, other)
    assert result.value == pytest.approx(entropy_distance(np.log10(one), np.log10(other)))
    assert result.low is not None and result.high is not None and result.low <= result.value <= result.high


def test_relearn_steps_and_the_anamnesis_index_by_hand() -> None:
    """Back within 5% of 1.0 after three steps, the retrained model after six: an index of a half."""
    curve, retrained = [0.1, 0.5, 0.9, 0.96, 1.0], [0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.95]
    assert relearn_steps(curve, 1.0) == 3 and relearn_steps(retrained, 1.0) == 6
    assert relearn_steps(curve, 1.0, margin=0.1) == 2 and relearn_steps(curve, 1.2) == math.inf
    assert AnamnesisIndex.estimate([3.0], [6.0]).value == 0.5
    assert AnamnesisIndex.estimate([3.0, 6.0], [6.0, 6.0]).value == pytest.approx(0.75)
    for steps, others in (([math.inf], [6.0]), ([3.0], [math.inf]), ([3.0], [0.0]), ([3.0], None)):
        result = AnamnesisIndex.estimate(steps, others)
        assert isinstance(result, Undefined) and math.isnan(result.value)


@pytest.mark.parametrize(
    ("metric", "columns"),
    [
        (AverageGap, (["a"], [1.0])),
        (TugOfWar, (["a"], [1.0])),
        (ActivationDistance, ([[1.0, 0.0]],)),
        (JSDivergence, ([[1.0, 0.0]],)),
        (EntropyDistance, ([0.5],)),
    ],
)
def test_undefined_without_a_retrained_model(metric: Any, columns: tuple) -> None:
    result = metric.estimate(*columns, None)
    assert (
        isinstance(result, Undefined) and result.reason == "no retrained model was given" and math.isnan(result.value)
    )
    assert math.isfinite(metric.estimate(*columns, columns[-1]).value)


@pytest.mark.parametrize("metric", [ActivationDistance, JSDivergence, ZeroRetrainForgetting])
def test_nan_outputs_make_a_metric_undefined(metric: Any) -> None:
    result = metric.estimate([[math.nan, 0.5], [0.5, 0.5]], [[0.5, 0.5], [0.1, 0.9]])
    assert math.isnan(result.value)
