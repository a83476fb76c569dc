"""Laws of the scores and their intervals: each equals a dense float64 twin and depends on the row alone; an interval
covers, narrows with n and repeats by seed. Each law has a negative control."""

from __future__ import annotations

import math
from dataclasses import astuple, fields
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from helpers import reference_losses as reference
from helpers import reference_metrics
from helpers.tiny import CASES, collate, sharpen, text_rows, tiny_bert, tiny_gpt2, tiny_llama
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from hf_unlearn.data.batches import PaddingCollator
from hf_unlearn.errors import DataError
from hf_unlearn.evaluation.metrics.intervals import Estimate, Undefined, auc, bootstrap, bootstrap_auc, bootstrap_mean
from hf_unlearn.evaluation.row_scores import RowScores, score_classes, score_predictions, score_rows
from hf_unlearn.models.forward import Predictions, output_logits, predict
from hf_unlearn.models.tasks import shifts_labels

NAMES = ("loss", "probability", "accuracy", "entropy", "extraction_strength", "min_k", "min_k_plus_plus")


def as_matrix(scores: RowScores) -> np.ndarray:
    return np.stack([getattr(scores, name) for name in NAMES], axis=1)


def predictions(logits_LV: list[list[float]], labels_L: list[int], rows_L: list[int] | None = None) -> Predictions:
    rows_L = list(range(len(labels_L))) if rows_L is None else rows_L
    return Predictions(torch.tensor(logits_LV), torch.tensor(labels_L), torch.tensor(rows_L), max(rows_L) + 1)


# Rows


def test_scores_come_in_the_order_of_the_fields() -> None:
    assert tuple(f.name for f in fields(RowScores)) == NAMES
    matrix = np.arange(14).reshape(2, 7)
    assert np.array_equal(as_matrix(RowScores.from_matrix(matrix)), matrix)
    both = RowScores.concatenate([RowScores.from_matrix(matrix), RowScores.from_matrix(matrix + 14)])
    assert np.array_equal(as_matrix(both), np.arange(28).reshape(4, 7))


@pytest.mark.parametrize("case", ["gpt2", "llama", "bert", "vit", "mlp"])
def test_row_scores_equal_their_twin(case: str) -> None:
    make, rows = CASES[case]
    model, batch = make(), collate(rows(5))
    with torch.no_grad():
        found = score_predictions(predict(model, batch)).numpy()
        logits = output_logits(model, batch).numpy()
    shifted = shifts_labels(model)
    twin = reference_metrics.row_scores(reference.labelled(logits, batch["labels"].numpy(), shifted=shifted))
    np.testing.assert_allclose(found, twin, rtol=1e-5, atol=1e-6)
    if batch["labels"].ndim == 2:
        wrong = reference_metrics.row_scores(reference.labelled(logits, batch["labels"].numpy(), shifted=not shifted))
        assert np.abs(found - wrong).max() > 1e-2


def test_accuracy_is_the_share_of_labels_that_are_most_probable() -> None:
    found = score_predictions(predictions([[2.0, 0], [2.0, 0], [0.0, 2], [2.0, 0]], [0, 1, 1, 1], [0, 0, 0, 1]))
    assert found[:, 2].tolist() == [pytest.approx(2 / 3), 0]


def test_probability_is_the_geometric_mean_over_a_rows_labels() -> None:
    found = score_predictions(predictions([[math.log(3), 0], [0.0, 0]], [0, 0], [0, 0]))
    assert found[0, 1].item() == pytest.approx(math.sqrt(0.75 * 0.5))
    assert found[0, 1].item() != pytest.approx((0.75 + 0.5) / 2)


@pytest.mark.parametrize("rest", [-1e4, -math.inf])
def test_a_masked_class_does_not_spoil_min_k_plus_plus(rest: float) -> None:
    found = score_predictions(predictions([[1.0, 0.0, rest]], [0]))
    assert found[0, 6].item() == pytest.approx(score_predictions(predictions([[1.0, 0.0]], [0]))[0, 6].item(), rel=1e-5)


@pytest.mark.parametrize(("right", "strength"), [("1111", 1), ("0111", 0.75), ("1101", 0.25), ("1110", 0), ("0000", 0)])
def test_extraction_strength_is_one_minus_the_share_of_the_prefix_that_is_needed(right: str, strength: float) -> None:
    """By hand: after `1101` three of four labels must be given before the rest follows; and no `1 / T` for nothing."""
    labels = [0 if flag == "1" else 1 for flag in right]
    found = score_predictions(predictions([[1.0, 0.0]] * 4, labels, [0] * 4))
    assert found[0, 4].item() == strength
    both = score_predictions(predictions([[1.0, 0.0]] * 8, labels + labels[::-1], [0] * 4 + [1] * 4))
    assert both[0, 4].item() == strength  # the next row's labels are not this one's


def test_min_k_looks_at_the_lowest_two_of_five_labels() -> None:
    """By hand: probabilities 1/2, 1/4, 1/8, 3/4, 7/8; of five labels 40% are two, of four still one, of one one."""
    p = [1 / 2, 1 / 4, 1 / 8, 3 / 4, 7 / 8]
    logits = [[math.log(value / (1 - value)), 0.0] for value in p]
    found = score_predictions(predictions(logits + logits[:4] + logits[:1], [0] * 10, [0] * 5 + [1] * 4 + [2]))
    assert found[:, 5].tolist() == pytest.approx([math.log(32) / 2, math.log(8), math.log(2)])
    assert found[0, 5].item() != pytest.approx(found[0, 0].item())


@pytest.mark.parametrize("chunk", [1, 7, 1 << 24])
def test_scores_do_not_depend_on_the_size_of_a_chunk(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = predict(tiny_llama(), collate(text_rows(5)))
    whole = score_predictions(given)
    monkeypatch.setattr("hf_unlearn.evaluation.row_scores.CHUNK", chunk)
    torch.testing.assert_close(score_predictions(given), whole, rtol=1e-6, atol=1e-7)


def test_scoring_makes_no_tensor_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    made = torch.Tensor.log_softmax
    monkeypatch.setattr(torch.Tensor, "log_softmax", lambda z, dim: (sizes.append(z.numel()), made(z, dim))[1])
    monkeypatch.setattr("hf_unlearn.evaluation.row_scores.CHUNK", 4 * 29)
    score_predictions(predict(tiny_llama(), collate(text_rows(5))))
    assert len(sizes) > 2 and max(sizes) <= 4 * 29


def test_a_nan_logit_makes_every_score_of_its_row_undefined_and_no_other_rows() -> None:
    logits = [[2.0, 0.0], [math.nan, 0.0], [2.0, 0.0], [1.0, 0.0]]
    found = score_predictions(predictions(logits, [0, 1, 0, 0], [0, 0, 0, 1]))
    assert found[0].isnan().all() and found[1].isfinite().all()
    assert (torch.tensor(logits).argmax(-1) == torch.tensor([0, 1, 0, 0])).any()  # what argmax alone would say


@pytest.mark.parametrize("case", ["llama", "gpt2", "bert", "vit"])
def test_scores_do_not_depend_on_batch_size_or_on_what_else_is_in_the_batch(case: str) -> None:
    make, rows = CASES[case]
    model, data = make(), rows(7)
    together = as_matrix(score_rows(model, data, PaddingCollator(), batch_size=7))
    for size in (1, 3):
        one_by_one = as_matrix(score_rows(model, data, PaddingCollator(), batch_size=size))
        np.testing.assert_allclose(one_by_one, together, rtol=1e-4, atol=1e-5)
    reverse = as_matrix(score_rows(model, data[::-1], PaddingCollator(), batch_size=3))
    np.testing.assert_allclose(reverse[::-1], together, rtol=1e-4, atol=1e-5)
    assert np.abs(reverse - together).max() > 1e-2  # rows are not all alike


@pytest.mark.parametrize("extra", [1, 5])
def test_scores_do_not_depend_on_padding(extra: int) -> None:
    def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        fill = {"input_ids": 3, "attention_mask": 0, "labels": -100}
        return {k: torch.nn.functional.pad(v, (0, extra), value=fill[k]) for k, v in collate(rows).items()}

    model, data = tiny_llama(), text_rows(4)
    plain = as_matrix(score_rows(model, data, PaddingCollator()))
    np.testing.assert_allclose(as_matrix(score_rows(model, data, padded)), plain, rtol=1e-4, atol=1e-5)
    labelled = [row | {"labels": row["input_ids"]} for row in data]  # labels on the prompt, which do count
    assert np.abs(as_matrix(score_rows(model, labelled, padded)) - plain).max() > 1e-2


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_entropy_of_the_uniform_distribution_is_the_logarithm_of_its_size(classes: int) -> None:
    assert score_predictions(predictions([[0.3] * classes], [1]))[0, 3].item() == pytest.approx(math.log(classes))
    assert score_predictions(predictions([[0.3] * (classes - 1) + [2.0]], [1]))[0, 3] < math.log(classes) - 1e-4


@pytest.mark.parametrize("rest", [-1e4, -math.inf])
def test_entropy_of_a_certain_prediction_is_zero_and_no_score_is_nan(rest: float) -> None:
    scores = score_predictions(predictions([[rest, 0.0, rest]], [1]))
    assert scores[0].tolist() == [0, 1, 1, 0, 1, 0, 0]
    p = torch.tensor([rest, 0.0, rest]).log_softmax(-1)
    if rest == -math.inf:
        assert torch.isnan(p.exp() * p).any()  # what the formula alone gives


@pytest.mark.parametrize("training", [True, False])
def test_scoring_is_in_eval_mode_and_gives_the_mode_back(training: bool) -> None:
    model = tiny_gpt2(dropout=0.5).train(training)
    scores = [as_matrix(score_rows(model, text_rows(4), PaddingCollator())) for _ in range(2)]
    assert np.array_equal(*scores)
    assert {m.training for m in model.modules()} == {training}
    with torch.no_grad():
        noisy = [score_predictions(predict(model.train(), collate(text_rows(4)))) for _ in range(2)]
    assert not torch.equal(*noisy)


def test_the_mode_comes_back_when_scoring_fails() -> None:
    model = tiny_gpt2().train()
    with pytest.raises(DataError):
        score_rows(model, text_rows(2, labels=False), PaddingCollator())
    assert model.training


def test_scoring_leaves_no_gradients() -> None:
    model = tiny_gpt2()
    score_rows(model, text_rows(2), PaddingCollator())
    assert all(p.grad is None for p in model.parameters())


def test_class_probabilities_are_the_softmax_of_the_logits_and_need_one_label_a_row() -> None:
    model, rows = CASES["vit"][0](), CASES["vit"][1](5)
    scores, probabilities = score_classes(model, rows, PaddingCollator(), batch_size=2)
    with torch.no_grad():
        logits = output_logits(model, collate(rows)).double().numpy()
    np.testing.assert_allclose(probabilities, [reference.softmax(z) for z in logits], rtol=1e-5)
    np.testing.assert_allclose(as_matrix(scores), as_matrix(score_rows(model, rows, PaddingCollator())), rtol=1e-4)
    with pytest.raises(DataError, match="this is for classifiers"):
        score_classes(tiny_llama(), text_rows(2), PaddingCollator())


@pytest.mark.parametrize("size", [1, 4])
def test_a_row_without_labels_is_an_error_whatever_batch_it_is_in(size: int) -> None:
    rows = text_rows(4)
    score_rows(tiny_gpt2(), rows, PaddingCollator(), batch_size=size)
    rows[2] = rows[2] | {"labels": [-100] * len(rows[2]["labels"])}
    with pytest.raises(DataError, match=r"-100|row 2 of a batch of 4 has no label"):
        score_rows(tiny_gpt2(), rows, PaddingCollator(), batch_size=size)


# Intervals


def samples(n: int, seed: int, mean: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1.0, n)


def width(estimate: Estimate) -> float:
    return estimate.high - estimate.low


def test_the_interval_of_a_mean_covers_it_about_95_times_in_100() -> None:
    found = [bootstrap_mean(samples(40, seed), seed) for seed in range(150)]
    share = np.mean([e.low <= 1.0 <= e.high for e in found])
    assert 0.89 <= share <= 0.99
    assert np.mean([e.low <= 1.5 <= e.high for e in found]) < 0.5


@given(st.integers(2, 60), st.integers(0, 1000))
@example(3, 984)  # the mean of three times the largest value is rounded to just above it
@settings(max_examples=10, deadline=None)
def test_a_mean_lies_in_its_interval_and_its_interval_in_the_data(n: int, seed: int) -> None:
    values = samples(n, seed)
    found = bootstrap_mean(values)
    assert found.value == pytest.approx(values.mean()) and found.n == n
    ulp = 1e-15 * np.abs(values).max()
    assert values.min() - ulp <= found.low <= found.value <= found.high <= values.max() + ulp


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
    for found, data, statistic in (
        (bootstrap_mean(values), (values,), lambda v, axis: v.mean(axis=axis)),
        (bootstrap_auc(values, others), (values, others), auc),
    ):
        twin = scipy.stats.bootstrap(data, statistic, method="percentile", n_resamples=1000, rng=1).confidence_interval
        assert found.low == pytest.approx(twin.low, abs=0.15 * width(found))
        assert found.high == pytest.approx(twin.high, abs=0.15 * width(found))
        assert width(found) > 0.05


def test_nothing_is_undefined_rather_than_zero_and_nan_stays() -> None:
    assert isinstance(bootstrap_mean([]), Undefined) and "no rows" in bootstrap_mean([]).reason
    found = bootstrap_mean([0.5, math.nan])
    assert math.isnan(found.value) and found.low is None
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
    found = float(auc(members, others))
    assert found == pytest.approx(roc_auc_score(truth, members + others))
    assert found == pytest.approx(reference.auc(np.array(members), np.array(others)))
    assert found == pytest.approx(1 - float(auc(others, members)))


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
    found = [bootstrap_auc(samples(30, seed, 0.5), samples(30, 1000 + seed, 0.0), seed) for seed in range(40)]
    assert np.mean([e.low <= truth <= e.high for e in found]) >= 0.85
    assert np.mean([e.low <= 0.95 <= e.high for e in found]) < 0.3


def test_one_forgotten_row_has_an_area_and_an_interval_from_the_others() -> None:
    others = np.arange(10.0)
    found = bootstrap_auc([6.5], others)
    assert found.value == pytest.approx(0.7) and found.low < 0.7 < found.high and found.n == 11
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
