"""Laws of predictions: shifted for decoder-only language models alone, masked labels are never read, and the mean
negative log-likelihood is the model's own loss. Each law has a negative control."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from helpers.reference_losses import labelled, nll
from helpers.tiny import (
    CASES,
    CLASSES,
    VOCABULARY,
    collate,
    sharpen,
    text_rows,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_mlp,
)
from hf_unlearn.errors import DataError, ModelError
from hf_unlearn.models.forward import Predictions, label_positions, output_logits, predict
from hf_unlearn.models.tasks import shifts_labels

BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}


def token_classifier() -> Any:
    torch.manual_seed(0)
    return sharpen(transformers.BertForTokenClassification(transformers.BertConfig(**BERT, num_labels=CLASSES)))


def masked_lm() -> Any:
    torch.manual_seed(0)
    return sharpen(transformers.BertForMaskedLM(transformers.BertConfig(**BERT)))


def t5() -> Any:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return sharpen(transformers.T5ForConditionalGeneration(config), 1.5)


def bart() -> Any:
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=VOCABULARY,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=2,
    )
    return sharpen(transformers.BartForConditionalGeneration(config))


def llava() -> Any:
    """A decoder that also sees images, whose class name says ForConditionalGeneration."""
    torch.manual_seed(0)
    text = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    return sharpen(
        transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(vision_config=vision, text_config=text))
    )


def token_class_rows(n: int) -> list[dict]:
    return [row | {"labels": [v if v < 0 else v % CLASSES for v in row["labels"]]} for row in text_rows(n)]


MODELS = {name: case for name, case in CASES.items() if name != "mlp"} | {
    "token_classifier": (token_classifier, token_class_rows),
    "masked_lm": (masked_lm, text_rows),
    "t5": (t5, text_rows),
    "bart": (bart, text_rows),
    "llava": (llava, text_rows),
}
SHIFTED = {"gpt2", "llama", "llava"}


@pytest.mark.parametrize("name", MODELS)
def test_only_decoder_only_language_models_shift_labels(name: str) -> None:
    assert shifts_labels(MODELS[name][0]()) == (name in SHIFTED)


def test_models_without_a_config_do_not_shift_and_wrapped_models_shift_as_inside() -> None:
    assert not shifts_labels(tiny_mlp())
    assert shifts_labels(nn.DataParallel(tiny_gpt2()))
    assert not shifts_labels(nn.DataParallel(tiny_bert()))


@pytest.mark.parametrize("name", MODELS)
def test_mean_nll_is_the_models_own_loss(name: str) -> None:
    make, rows = MODELS[name]
    model, batch = make(), collate(rows(4))
    with torch.no_grad():
        computed, expected = predict(model, batch).nll_L.mean(), model(**batch).loss
    torch.testing.assert_close(computed, expected, rtol=1e-5, atol=1e-6)


def test_negative_control_unshifted_labels_are_not_the_models_own_loss() -> None:
    model, batch = tiny_gpt2(), collate(text_rows(4))
    model.loss_type = "ForTokenClassification"  # what is asked here, not what the model computes
    with torch.no_grad():
        assert abs(predict(model, batch).nll_L.mean() - tiny_gpt2()(**batch).loss) > 0.1


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_logits_at_a_label_are_those_of_the_position_before(name: str) -> None:
    make, rows = MODELS[name]
    model, batch = make(), collate(rows(4))
    with torch.no_grad():
        predictions, logits = predict(model, batch), output_logits(model, batch).numpy()
    twin = labelled(logits, batch["labels"].numpy(), shifted=True)
    expected = [(b, z, y) for b, row in enumerate(twin) for z, y in row]
    assert predictions.rows_L.tolist() == [b for b, _, _ in expected]
    assert predictions.labels_L.tolist() == [y for _, _, y in expected]
    np.testing.assert_array_equal(
        predictions.logits_LV.numpy(), np.array([z for _, z, _ in expected], dtype=np.float32)
    )
    np.testing.assert_allclose(predictions.nll_L, [nll(z, y) for _, z, y in expected], rtol=1e-5, atol=1e-5)
    unshifted = labelled(logits, batch["labels"].numpy(), shifted=False)
    assert not np.allclose(predictions.logits_LV[0], unshifted[0][0][0])


@pytest.mark.parametrize("name", ["gpt2", "llama", "token_classifier", "masked_lm"])
def test_masked_labels_are_never_read(name: str) -> None:
    make, rows = MODELS[name]
    model, batch = make(), collate(rows(4))
    predictions = predict(model, batch)
    assert (predictions.labels_L >= 0).all()
    assert predictions.lengths_B.tolist() == [(row["labels"] != -100).sum().item() for row in _split(batch)]
    open_labels = batch["labels"].clone()
    open_labels[open_labels == -100] = 1
    assert predict(model, {**batch, "labels": open_labels}).lengths_B.sum() > predictions.lengths_B.sum()


def _split(batch: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    return [{key: value[i] for key, value in batch.items()} for i in range(len(batch["labels"]))]


def test_a_causal_model_never_predicts_the_first_token() -> None:
    batch = collate(text_rows(3, prompt=0))
    tokens = batch["attention_mask"].sum(1)
    assert predict(tiny_llama(), batch).lengths_B.tolist() == (tokens - 1).tolist()
    assert predict(masked_lm(), batch).lengths_B.tolist() == tokens.tolist()


def test_a_masked_class_label_leaves_its_row_out() -> None:
    batch = collate(CASES["bert"][1](3))
    batch["labels"][1] = -100
    predictions = predict(tiny_bert(), batch)
    assert (
        predictions.rows_L.tolist() == [0, 2]
        and predictions.lengths_B.tolist() == [1, 0, 1]
        and predictions.n_rows == 3
    )


def test_skip_first_leaves_out_exactly_the_first_label_of_each_row() -> None:
    model, batch = tiny_gpt2(), collate(text_rows(4, lengths=(7, 6), prompt=2))  # answers of three labels and more
    whole, rest = predict(model, batch), predict(model, batch, skip_first=True)
    for b in range(4):
        assert rest.labels_L[rest.rows_L == b].tolist() == whole.labels_L[whole.rows_L == b].tolist()[1:]
    assert rest.lengths_B.tolist() == (whole.lengths_B - 1).tolist()


def test_skip_first_does_not_touch_tags() -> None:  # the first tag of a row is not the first token of an answer
    make, rows = MODELS["token_classifier"]
    model, batch = make(), collate(rows(4))
    assert predict(model, batch, skip_first=True).lengths_B.tolist() == predict(model, batch).lengths_B.tolist()


def test_skip_first_does_not_touch_class_labels() -> None:
    batch = collate(CASES["bert"][1](3))
    assert label_positions(tiny_bert(), batch["labels"], skip_first=True).all()


def test_sums_and_lengths_by_row_equal_a_loop() -> None:
    rows_L, values_L = torch.tensor([0, 0, 2, 3, 3, 3]), torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    predictions = Predictions(torch.zeros(6, 2), torch.zeros(6, dtype=torch.long), rows_L, n_rows=5)
    expected = [sum(v for r, v in zip(rows_L.tolist(), values_L.tolist(), strict=True) if r == b) for b in range(5)]
    assert predictions.sum_by_row(values_L).tolist() == expected == [3, 0, 4, 56, 0]
    assert predictions.lengths_B.tolist() == [2, 0, 1, 3, 0]


def test_sums_by_row_carry_gradients_to_their_own_values() -> None:
    values_L = torch.ones(3, requires_grad=True)
    predictions = Predictions(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long), torch.tensor([0, 1, 1]), n_rows=2)
    predictions.sum_by_row(values_L)[1].backward()
    assert values_L.grad is not None and values_L.grad.tolist() == [0, 1, 1]


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_batch_with_every_label_masked_is_an_error(name: str) -> None:
    make, rows = MODELS[name]
    batch = collate(rows(3))
    with pytest.raises(DataError, match=r"3 rows is -100"):
        predict(make(), {**batch, "labels": torch.full_like(batch["labels"], -100)})
    assert len(predict(make(), batch).labels_L)  # the same batch with its labels is none


@pytest.mark.parametrize(("labels", "kept"), [(1, 1), (2, 2), (3, 2), (5, 4)])
def test_skip_first_keeps_all_labels_of_a_short_answer(labels: int, kept: int) -> None:
    batch = collate(text_rows(2, lengths=(3 + labels,), prompt=3))
    assert predict(tiny_gpt2(), batch).lengths_B.tolist() == [labels, labels]
    assert predict(tiny_gpt2(), batch, skip_first=True).lengths_B.tolist() == [kept, kept]


def test_skip_first_looks_at_each_answer_of_a_row() -> None:
    labels = torch.tensor([[-100, 4, 5, -100, 6, 7, 8, -100, -100, 9]])
    expected = [[True, True, False, False, True, True, False, False, True]]
    assert label_positions(tiny_gpt2(), labels, skip_first=True).tolist() == expected
    assert label_positions(tiny_gpt2(), labels).sum() == 6


def test_a_batch_without_labels_is_an_error_that_names_its_columns() -> None:
    with pytest.raises(DataError, match=r"no column 'labels', only \['attention_mask', 'input_ids'\]"):
        predict(tiny_gpt2(), collate(text_rows(2, labels=False)))


def test_a_model_without_a_head_is_an_error() -> None:
    with pytest.raises(ModelError, match=r"BertModel returns no logits"):
        predict(transformers.BertModel(transformers.BertConfig(**BERT)), collate(text_rows(2)))


def test_plain_tensors_are_logits() -> None:
    model, batch = tiny_mlp(), collate(CASES["mlp"][1](3))
    assert torch.equal(predict(model, batch).logits_LV, model(batch["pixel_values"]))
