"""Laws of the scores and their intervals: each equals a dense float64 twin and depends on the row alone; an interval
covers, narrows with n and repeats by seed. Each law has a negative control."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

from helpers import reference_losses as reference
from helpers import reference_metrics
from helpers.tiny import CASES, collate, text_rows, tiny_gpt2, tiny_llama
from hf_unlearn.data.batches import PaddingCollator
from hf_unlearn.errors import DataError
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
        result = score_predictions(predict(model, batch)).numpy()
        logits = output_logits(model, batch).numpy()
    shifted = shifts_labels(model)
    twin = reference_metrics.row_scores(reference.labelled(logits, batch["labels"].numpy(), shifted=shifted))
    np.testing.assert_allclose(result, twin, rtol=1e-5, atol=1e-6)
    if batch["labels"].ndim == 2:
        wrong = reference_metrics.row_scores(reference.labelled(logits, batch["labels"].numpy(), shifted=not shifted))
        assert np.abs(result - wrong).max() > 1e-2


def test_accuracy_is_the_share_of_labels_that_are_most_probable() -> None:
    result = score_predictions(predictions([[2.0, 0], [2.0, 0], [0.0, 2], [2.0, 0]], [0, 1, 1, 1], [0, 0, 0, 1]))
    assert result[:, 2].tolist() == [pytest.approx(2 / 3), 0]


def test_probability_is_the_geometric_mean_over_a_rows_labels() -> None:
    result = score_predictions(predictions([[math.log(3), 0], [0.0, 0]], [0, 0], [0, 0]))
    assert result[0, 1].item() == pytest.approx(math.sqrt(0.75 * 0.5))
    assert result[0, 1].item() != pytest.approx((0.75 + 0.5) / 2)


@pytest.mark.parametrize("rest", [-1e4, -math.inf])
def test_a_masked_class_does_not_spoil_min_k_plus_plus(rest: float) -> None:
    result = score_predictions(predictions([[1.0, 0.0, rest]], [0]))
    assert result[0, 6].item() == pytest.approx(
        score_predictions(predictions([[1.0, 0.0]], [0]))[0, 6].item(), rel=1e-5
    )


@pytest.mark.parametrize(("right", "strength"), [("1111", 1), ("0111", 0.75), ("1101", 0.25), ("1110", 0), ("0000", 0)])
def test_extraction_strength_is_one_minus_the_share_of_the_prefix_that_is_needed(right: str, strength: float) -> None:
    """By hand: after `1101` three of four labels must be given before the rest follows; and no `1 / T` for nothing."""
    labels = [0 if flag == "1" else 1 for flag in right]
    result = score_predictions(predictions([[1.0, 0.0]] * 4, labels, [0] * 4))
    assert result[0, 4].item() == strength
    both = score_predictions(predictions([[1.0, 0.0]] * 8, labels + labels[::-1], [0] * 4 + [1] * 4))
    assert both[0, 4].item() == strength  # the next row's labels are not this one's


def test_min_k_looks_at_the_lowest_two_of_five_labels() -> None:
    """By hand: probabilities 1/2, 1/4, 1/8, 3/4, 7/8; of five labels 40% are two, of four still one, of one one."""
    p = [1 / 2, 1 / 4, 1 / 8, 3 / 4, 7 / 8]
    logits = [[math.log(value / (1 - value)), 0.0] for value in p]
    result = score_predictions(predictions(logits + logits[:4] + logits[:1], [0] * 10, [0] * 5 + [1] * 4 + [2]))
    assert result[:, 5].tolist() == pytest.approx([math.log(32) / 2, math.log(8), math.log(2)])
    assert result[0, 5].item() != pytest.approx(result[0, 0].item())


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
    result = score_predictions(predictions(logits, [0, 1, 0, 0], [0, 0, 0, 1]))
    assert result[0].isnan().all() and result[1].isfinite().all()
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
def test_scoring_is_in_eval_mode_and_restores_the_training_mode(training: bool) -> None:
    model = tiny_gpt2(dropout=0.5).train(training)
    scores = [as_matrix(score_rows(model, text_rows(4), PaddingCollator())) for _ in range(2)]
    assert np.array_equal(*scores)
    assert {m.training for m in model.modules()} == {training}
    with torch.no_grad():
        noisy = [score_predictions(predict(model.train(), collate(text_rows(4)))) for _ in range(2)]
    assert not torch.equal(*noisy)


def test_the_training_mode_is_restored_when_scoring_fails() -> None:
    model = tiny_gpt2().train()
    with pytest.raises(DataError):
        score_rows(model, text_rows(2, prompt=9), PaddingCollator())  # every label is -100
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
