"""Laws of padding: what a row is padded with, on which side, and in which batch changes neither its labels nor its
scores; ids and lengths that an embedding has no row for are errors. Each has a negative control."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BartForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from helpers.tiny import collate, sharpen, text_rows, tiny_bert, tiny_gpt2, tiny_llama
from hf_unlearn.data.batches import PaddingCollator
from hf_unlearn.data.encoding import encode_dataset
from hf_unlearn.errors import DataError
from hf_unlearn.evaluation.row_scores import score_rows
from hf_unlearn.losses import build_loss
from hf_unlearn.models.forward import counted_labels, output_logits, predict
from hf_unlearn.models.tasks import context_length, vocabulary_size
from hf_unlearn.statistics.collect import collect_statistics

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
BART: dict[str, Any] = {
    "vocab_size": 50,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "max_position_embeddings": 24,
}


def prepadded(rows: list[dict[str, Any]], length: int, pad: int, left: bool = False) -> list[dict[str, Any]]:
    """Rows that were padded before, with labels on the padding."""
    padded = []
    for row in rows:
        filled = {}
        for name, value in (("input_ids", pad), ("attention_mask", 0), ("labels", pad)):
            padding = [value] * (length - len(row[name]))
            filled[name] = padding + row[name] if left else row[name] + padding
        padded.append(filled)
    return padded


@pytest.mark.parametrize("fisher", [False, True])
def test_labels_on_padding_do_not_count(fisher: bool) -> None:
    model, rows = tiny_llama(), text_rows(3, lengths=(4, 6, 5))
    padded = prepadded(rows, 9, pad=2)
    plain, filled = (score_rows(model, part, PaddingCollator(2)) for part in (rows, padded))
    np.testing.assert_allclose(filled.loss, plain.loss, rtol=1e-5)
    np.testing.assert_allclose(filled.min_k, plain.min_k, rtol=1e-5)
    for name in ("ce_u", "grad_ascent", "npo"):
        counts = [build_loss(name).counts(model, {"forget": collate(part)}) for part in (rows, padded)]
        assert counts[0] == counts[1]
    one, other = (collect_statistics(model, part, fisher=fisher, progress=False) for part in (rows, padded))
    assert (one.rows, one.labels, one.data) == (other.rows, other.labels, other.data)
    unmasked = [{**row, "attention_mask": [1] * 9} for row in padded]  # negative control
    assert not np.allclose(score_rows(model, unmasked, PaddingCollator(2)).loss, plain.loss, rtol=1e-3)


def test_no_label_is_predicted_from_padding() -> None:
    rows = text_rows(3, lengths=(4, 6, 5), prompt=0)
    model, right, left = tiny_llama(), collate(rows), collate(prepadded(rows, 9, 2, left=True))
    assert predict(model, right).lengths_B.tolist() == predict(model, left).lengths_B.tolist() == [3, 5, 4]
    assert torch.equal(predict(model, right).labels_L, predict(model, left).labels_L)
    assert (left["labels"] != -100).sum() > 15  # which without the mask would count


def test_tags_on_padding_do_not_count_and_classes_are_as_they_are() -> None:
    bert = tiny_bert()
    batch = {"labels": torch.tensor([[1, 2, 0]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    assert counted_labels(bert, batch).tolist() == [[1, 2, -100]]
    assert counted_labels(bert, {**batch, "labels": torch.tensor([1])}).tolist() == [1]


def test_an_encoders_mask_says_nothing_about_the_labels_of_a_decoder() -> None:
    model = BartForConditionalGeneration(BartConfig(**BART)).eval()
    batch = {"labels": torch.tensor([[7, 8, 9]]), "attention_mask": torch.tensor([[1, 1, 0]])}
    assert counted_labels(model, batch).tolist() == [[7, 8, 9]]
    batch["decoder_attention_mask"] = torch.tensor([[1, 0, 0]])
    assert counted_labels(model, batch).tolist() == [[7, -100, -100]]


def classifier(kind: str, pad: int | None) -> Any:
    torch.manual_seed(0)
    if kind == "llama":
        return sharpen(LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=3, pad_token_id=pad)).eval())
    if kind == "gpt2":
        sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2}
        return sharpen(GPT2ForSequenceClassification(GPT2Config(**sizes, num_labels=3, pad_token_id=pad)).eval())
    if kind == "roberta":
        config = RobertaConfig(**SIZES, num_labels=3, pad_token_id=1, max_position_embeddings=34, type_vocab_size=1)
        return sharpen(RobertaForSequenceClassification(config).eval())
    return sharpen(BartForSequenceClassification(BartConfig(**BART, num_labels=3, pad_token_id=1)).eval())


@pytest.mark.parametrize("pad_with", [0, 1, 2, 49])
@pytest.mark.parametrize(
    ("kind", "pad"),
    [("llama", None), ("llama", 0), ("llama", 7), ("gpt2", None), ("gpt2", 0), ("roberta", 1), ("bart", 1)],
)
def test_a_classifiers_scores_do_not_depend_on_the_batch(kind: str, pad: int | None, pad_with: int) -> None:
    model = classifier(kind, pad)
    rows = [{"input_ids": [*range(5, 5 + n), 2], "labels": n % 3} for n in (2, 5, 9)]  # 2: the end token of BART
    alone, together = (score_rows(model, rows, PaddingCollator(pad_with), size).probability for size in (1, 3))
    np.testing.assert_allclose(alone, together, atol=1e-5)
    assert collect_statistics(model, rows, collator=PaddingCollator(pad_with), progress=False).rows == 3
    assert model.config.pad_token_id == pad  # as it was
    for row, one in zip(rows, alone, strict=True):
        logits = model(torch.tensor([row["input_ids"]])).logits
        assert logits.softmax(-1)[0, row["labels"]].item() == pytest.approx(one, abs=1e-5)


def test_scores_depend_on_the_padding_without_the_models_own_padding_id() -> None:  # negative control
    model = classifier("llama", 0)
    tokens = torch.tensor([[5, 6, 7]])
    padded, mask = torch.tensor([[5, 6, 7, 2, 2]]), torch.tensor([[1, 1, 1, 0, 0]])
    assert not torch.allclose(model(tokens).logits, model(padded, attention_mask=mask).logits, atol=1e-3)
    inputs = {"input_ids": padded, "attention_mask": mask}
    torch.testing.assert_close(output_logits(model, inputs), model(tokens).logits)


def test_no_padding_id_is_left_when_every_token_ends_a_row() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        **{**SIZES, "vocab_size": 3}, num_labels=3, pad_token_id=None, bos_token_id=None, eos_token_id=None
    )
    model = LlamaForSequenceClassification(config)
    with pytest.raises(DataError, match="no pad_token_id, and a batch ends with every token"):
        output_logits(model, {"input_ids": torch.tensor([[0], [1], [2]])})
    assert output_logits(model, {"input_ids": torch.tensor([[0], [1]])}).shape == (2, 3)


# Ids and lengths that a model has no embedding for


@pytest.mark.parametrize("token", [-1, 29, 1000])
def test_an_unknown_id_is_an_error_by_name(token: int) -> None:
    model, size = tiny_llama(), vocabulary_size(tiny_llama())
    assert size == 29
    rows = [{"input_ids": [5, token, 7], "labels": [-100, 5, 7]}]
    for use in (lambda: collect_statistics(model, rows, progress=False), lambda: predict(model, collate(rows))):
        with pytest.raises(DataError, match=f"token id {token}; the model has embeddings for ids 0 to 28"):
            use()
    rows[0]["input_ids"][1] = 28
    assert collect_statistics(model, rows, progress=False).rows == 1


class Added:
    """A tokenizer with a token that was added later."""

    eos_token_id, chat_template = 1, None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [29 if word == "new" else 5 for word in text.split()]


def test_an_unknown_id_of_a_raw_row_names_the_row() -> None:
    tokenizer: Any = Added()
    with pytest.raises(DataError, match=r"row 1 of the forget set has the token id 29; .*resize_token_embeddings"):
        encode_dataset([{"text": "a b"}, {"text": "a new b"}], tokenizer, model=tiny_llama(), what="forget")
    assert len(encode_dataset([{"text": "a b"}], tokenizer, model=tiny_llama())) == 1


def test_unknown_ids_of_a_decoder_and_unknown_token_types_are_errors() -> None:
    bart = BartForConditionalGeneration(BartConfig(**BART)).eval()
    batch = {"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[7, -100]])}
    assert len(predict(bart, batch).labels_L) == 1
    with pytest.raises(DataError, match="token id 50"):
        predict(bart, {**batch, "labels": torch.tensor([[50, 7]])})
    roberta = classifier("roberta", 1)
    typed = {"input_ids": torch.tensor([[5, 6]]), "token_type_ids": torch.tensor([[0, 1]])}
    with pytest.raises(DataError, match="token type 1, the model has types 0 to 0"):
        output_logits(roberta, typed)
    assert output_logits(roberta, {**typed, "token_type_ids": torch.tensor([[0, 0]])}).shape == (1, 3)


def test_positions_that_start_behind_the_padding_id_leave_a_shorter_context() -> None:
    model = classifier("roberta", 1)
    assert context_length(model) == 32 and model.config.max_position_embeddings == 34
    for length in (32, 33, 34):
        rows = [{"input_ids": [5] * length, "attention_mask": [1] * length, "labels": 0}]
        if length == 32:
            assert collect_statistics(model, rows, progress=False).rows == 1
        else:
            with pytest.raises(DataError, match=f"has {length} tokens, the model's context is 32"):
                collect_statistics(model, rows, progress=False)
    assert context_length(tiny_gpt2()) == 32
