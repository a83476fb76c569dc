"""Laws of the language metrics: each equals a hand-computed example and a slow twin on probabilities; what is undefined
says so; fed in parts by several processes it is what it is in one. Each law has a negative control."""

from __future__ import annotations

import math
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import reference_metrics as reference
from hf_unlearn.errors import DataError
from hf_unlearn.evaluation.generation import rouge_l
from hf_unlearn.evaluation.metrics.classification import (
    ActivationDistance,
    AnamnesisIndex,
    AverageGap,
    EntropyDistance,
    JSDivergence,
    TugOfWar,
    ZeroRetrainForgetting,
)
from hf_unlearn.evaluation.metrics.intervals import Undefined
from hf_unlearn.evaluation.metrics.language import (
    ForgetQuality,
    MultipleChoiceProbability,
    RougeL,
    TruthRatio,
    log_truth_ratios,
)
from hf_unlearn.evaluation.metrics.membership import MembershipAUC, MembershipEfficacy, PrivLeak, ShadowAttack
from hf_unlearn.evaluation.metrics.row_means import Probability, RowMean
from hf_unlearn.evaluation.metrics.utility import UTILITY_PARTS, HarmonicMean, ModelUtility

EVERY = [
    RowMean,
    Probability,
    MultipleChoiceProbability,
    TruthRatio,
    ForgetQuality,
    HarmonicMean,
    ModelUtility,
    RougeL,
    MembershipAUC,
    PrivLeak,
    MembershipEfficacy,
    ShadowAttack,
    AverageGap,
    TugOfWar,
    ActivationDistance,
    JSDivergence,
    ZeroRetrainForgetting,
    EntropyDistance,
    AnamnesisIndex,
]
HALF, QUARTER, EIGHTH = math.log(2), math.log(4), math.log(8)  # losses of answers of this probability


def rows(seed: int, n: int = 9) -> tuple[np.ndarray, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    return rng.exponential(1, n), [rng.exponential(1.5, 2 + i % 3) for i in range(n)]


# Probability and multiple choice


def test_probability_by_hand() -> None:
    assert Probability.estimate([HALF, QUARTER]).value == pytest.approx(0.375)
    assert Probability.estimate([HALF, math.inf]).value == pytest.approx(0.25)


def test_multiple_choice_by_hand_and_by_twin() -> None:
    """1/2 against 1/4 and 1/4 is a half; 1/4 against 1/4 a half; 1/8 against 1/2, 1/4 a seventh."""
    result = MultipleChoiceProbability.estimate([HALF, QUARTER, EIGHTH], [[QUARTER] * 2, [QUARTER], [HALF, QUARTER]])
    assert result.value == pytest.approx((0.5 + 0.5 + 1 / 7) / 3) and result.n == 3
    loss, wrong = rows(0)
    twin = np.mean([math.exp(-a) / (math.exp(-a) + sum(np.exp(-w))) for a, w in zip(loss, wrong, strict=True)])
    assert MultipleChoiceProbability.estimate(loss, wrong).value == pytest.approx(twin)
    assert abs(Probability.estimate(loss).value - twin) > 0.02


def test_multiple_choice_of_answers_too_improbable_for_a_float_is_still_right() -> None:
    assert MultipleChoiceProbability.estimate([2000.0], [[2000.0]]).value == pytest.approx(0.5)
    with np.errstate(invalid="ignore"):
        assert math.isnan(np.exp(-2000.0) / (np.exp(-2000.0) + np.exp(-2000.0)))


# Truth ratio


def test_truth_ratio_by_hand() -> None:
    """Wrong answers 1/2 and 1/8: geometric mean 1/4, arithmetic 5/16; over a paraphrase of 1/2."""
    assert np.exp(log_truth_ratios([HALF], [[HALF, EIGHTH]])) == pytest.approx([0.5])
    assert np.exp(log_truth_ratios([HALF], [[HALF, EIGHTH]], arithmetic=True)) == pytest.approx([0.625])
    assert TruthRatio.estimate([HALF], [[HALF, EIGHTH]]).value == pytest.approx(0.5)
    assert TruthRatio.estimate([EIGHTH], [[QUARTER]]).value == pytest.approx(0.5)  # 2 counts as 1/2
    assert TruthRatio.estimate([HALF], [[EIGHTH]], forget=False).value == pytest.approx(0.75)
    assert TruthRatio.estimate([EIGHTH], [[HALF]], forget=False).value == 0


@given(st.integers(0, 500), st.booleans())
@settings(max_examples=25, deadline=None)
def test_truth_ratio_equals_its_twin(seed: int, arithmetic: bool) -> None:
    loss, wrong = rows(seed)
    ratios = [reference.truth_ratio(a, w, arithmetic) for a, w in zip(loss, wrong, strict=True)]
    options: dict[str, Any] = {"arithmetic": arithmetic}
    assert TruthRatio.estimate(loss, wrong, **options).value == pytest.approx(np.mean([min(r, 1 / r) for r in ratios]))
    others = TruthRatio.estimate(loss, wrong, forget=False, **options).value
    assert others == pytest.approx(np.mean([max(0, 1 - r) for r in ratios]))
    assert (
        TruthRatio.estimate(loss, wrong, arithmetic=not arithmetic).value
        != TruthRatio.estimate(loss, wrong, **options).value
    )


def test_truth_ratio_of_a_destroyed_model_does_not_underflow() -> None:
    """A model that finds every answer impossible tells nothing apart: 1, where `p / (p + 1e-10)` says 0."""
    assert TruthRatio.estimate([900.0], [[900.0, 900.0]]).value == pytest.approx(1)
    assert math.exp(-900) / (math.exp(-900) + 1e-10) == 0


@pytest.mark.parametrize("metric", [TruthRatio, MultipleChoiceProbability])
def test_a_row_without_wrong_answers_is_an_error_that_names_it(metric: Any) -> None:
    with pytest.raises(DataError, match="row 1 has no wrong answer"):
        metric.estimate([1.0, 1.0], [[1.0], []])
    with pytest.raises(DataError, match="2 right answers come with wrong answers for 1 rows"):
        metric.estimate([1.0, 1.0], [[1.0]])


# Forget quality


def test_forget_quality_equals_the_share_of_deals_at_least_as_far_apart() -> None:
    rng = np.random.default_rng(0)
    for shift in (0.0, 1.0, 5.0):
        left, right = rng.normal(0, 1, 5), rng.normal(shift, 1, 5)
        result = ForgetQuality.estimate(left, right)
        assert result.value == pytest.approx(reference.ks_pvalue(left, right)) and result.n == 5
    assert ForgetQuality.estimate([1, 2, 3, 4], [5, 6, 7, 8]).value == pytest.approx(2 / 70)  # by hand: 2 of C(8, 4)
    assert ForgetQuality.estimate([1, 2, 3, 4], [1, 2, 3, 4]).value == 1


def test_forget_quality_depends_on_the_order_of_the_ratios_alone() -> None:
    left, right = np.random.default_rng(1).normal([[0], [0.6]], 1, (2, 30))
    p = ForgetQuality.estimate(left, right).value
    assert ForgetQuality.estimate(np.exp(left), np.exp(right)).value == p == ForgetQuality.estimate(-left, -right).value
    assert ForgetQuality.estimate(left, right + 1).value < p < 0.2


def test_forget_quality_is_two_sided() -> None:
    low, high = np.arange(10.0), np.arange(10.0) + 20
    assert ForgetQuality.estimate(low, high).value == ForgetQuality.estimate(high, low).value < 1e-4


@pytest.mark.parametrize(
    ("left", "right", "reason"),
    [
        ([1.0, 2, 3, 4], None, "no retrained model was given"),
        ([1.0], [2.0], "a test on 1 rows can show no difference"),
        ([1.0, 2, 3, math.nan], [1.0, 2, 3, 4], "not a number"),
    ],
)
def test_an_undefined_forget_quality_is_nan_and_gives_the_reason(left: Any, right: Any, reason: str) -> None:
    result = ForgetQuality.estimate(left, right)
    assert isinstance(result, Undefined) and reason in result.reason and math.isnan(result.value) and result.low is None


# Harmonic means


def test_model_utility_by_hand_and_by_twin() -> None:
    """Nine parts, one of them 1/4 and the others 1: 9 / (8 + 4)."""
    names, scores = list(UTILITY_PARTS), [0.25, *[1.0] * 8]
    assert ModelUtility.estimate(names, scores).value == pytest.approx(0.75)
    rng = np.random.default_rng(0)
    parts = {name: rng.uniform(0.1, 1, 3 + i) for i, name in enumerate(names)}
    group, score = [n for n, v in parts.items() for _ in v], np.concatenate(list(parts.values()))
    result = ModelUtility.estimate(group, score)
    assert result.value == pytest.approx(reference.harmonic([v.mean() for v in parts.values()])) and result.n == len(
        score
    )
    assert result.low is not None and result.high is not None and result.low < result.value < result.high
    assert abs(result.value - score.mean()) > 0.01


def test_model_utility_is_zero_where_one_part_is_and_needs_all_nine() -> None:
    names = list(UTILITY_PARTS)
    assert ModelUtility.estimate(names, [0.0, *[1.0] * 8]).value == 0
    with pytest.raises(DataError, match="missing or unknown: world_facts/truth_ratio"):
        ModelUtility.estimate(names[:-1], [1.0] * 8)
    assert HarmonicMean.estimate(["a", "b"], [1.0, 0.5]).value == pytest.approx(2 / 3)


# ROUGE-L

WORDS = st.lists(st.sampled_from("alpha beta gamma delta omega".split()), min_size=1, max_size=6)


@given(WORDS, WORDS)
@settings(max_examples=40, deadline=None)
def test_rouge_l_equals_the_longest_common_subsequence(result: list[str], true: list[str]) -> None:
    common = reference.longest_common_subsequence(result, true)
    texts = [" ".join(result)], [" ".join(true)]
    recall, precision = common / len(true), common / len(result)
    assert rouge_l(*texts) == pytest.approx([recall])
    assert rouge_l(*texts, "fmeasure") == pytest.approx(
        [2 * recall * precision / (recall + precision) if common else 0]
    )


def test_rouge_l_by_hand() -> None:
    """Two of the three true words come in order; the stemmer makes `runs` and `running` one word."""
    assert RougeL.estimate(["a cat sat"], ["a cat ran"]).value == pytest.approx(2 / 3)
    assert rouge_l(["running cat"], ["runs fast"]) == [0.5]
    assert rouge_l(["running cat"], ["runs fast"], stemmer=False) == [0]


# As evaluate.Metric


@pytest.mark.parametrize("metric", EVERY, ids=lambda m: m.__name__)
def test_every_metric_is_an_evaluate_metric_with_a_description(metric: Any, tmp_path: Path) -> None:
    made = metric(cache_dir=str(tmp_path))
    assert len(made.description) > 40 and set(made.features) == set(metric.inputs)
    with pytest.raises(ValueError):
        made.compute()


def test_batches_add_up_and_options_reach_the_estimate() -> None:
    loss, wrong = rows(3)
    metric = TruthRatio(keep_in_memory=True)
    for part in (slice(0, 4), slice(4, 9)):
        metric.add_batch(paraphrase_loss=loss[part], wrong_losses=wrong[part])
    result = metric.compute(forget=False, seed=2)
    twin = TruthRatio.estimate(loss, wrong, forget=False, seed=2)
    assert result == {"truth_ratio": twin.value, "low": twin.low, "high": twin.high, "n": 9}
    assert result != TruthRatio.estimate(loss, wrong).value


def test_an_undefined_metric_computes_to_nan_with_its_reason() -> None:
    result = ForgetQuality(keep_in_memory=True).compute(truth_ratio=[1.0], retrained_truth_ratio=[1.0])
    assert result is not None and math.isnan(result["forget_quality"]) and "can show no difference" in result["reason"]


def feed(folder: str, process: int, processes: int, results: Any) -> None:
    metric = Probability(num_process=processes, process_id=process, experiment_id="one", cache_dir=folder)
    metric.add_batch(loss=np.arange(6.0)[process::processes])
    results.put((process, metric.compute()))


def test_rows_added_by_two_processes_count_once_each(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    started = [context.Process(target=feed, args=(str(tmp_path), i, 2, results)) for i in range(2)]
    for process in started:
        process.start()
    result = dict(results.get(timeout=60) for _ in started)
    for process in started:
        process.join()
    assert result[1] is None and result[0]["n"] == 6
    assert result[0]["probability"] == pytest.approx(np.exp(-np.arange(6.0)).mean())
    assert result[0]["probability"] != pytest.approx(np.exp(-np.arange(6.0)[::2]).mean())
