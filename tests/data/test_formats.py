"""Laws of raw rows by task: the model's task decides what text and label rows become; alternate answers are encoded as
the answers are; streams give the same statistics; mistakes are errors. Each has a negative control."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from helpers.pictures import processor
from helpers.texts import ANSWER, CHAT, QUESTION, WORDS, read, tokenizer
from helpers.tiny import (
    CLASSES,
    collate,
    image_rows,
    text_class_rows,
    text_rows,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_mlp,
    tiny_vit,
)
from hf_unlearn.data import encoding as data
from hf_unlearn.data.batches import PaddingCollator, own_batches, take
from hf_unlearn.data.checks import require_alternates, require_disjoint, require_labels
from hf_unlearn.data.encoding import EncodedRows, RowStream, encode_dataset, idk_answers
from hf_unlearn.data.pairs import PairedCollator, PairedDataset
from hf_unlearn.errors import DataError, ModelError
from hf_unlearn.evaluation.evaluate import evaluate_unlearning
from hf_unlearn.evaluation.row_scores import score_rows
from hf_unlearn.models.forward import predict
from hf_unlearn.models.tasks import task_of
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.trainer.config import UnlearningConfig
from hf_unlearn.trainer.trainer import UnlearningTrainer

Row = dict[str, Any]
SENTENCES = [{"text": QUESTION, "label": 2}, {"text": ANSWER, "label": 0}]


def pictures(n: int, size: int = 8, mode: str = "L") -> list[Row]:
    """`n` noise pictures with a class each."""
    grey = np.random.default_rng(0).integers(0, 256, (n, size, size), dtype=np.uint8)
    return [{"image": Image.fromarray(grey[i]).convert(mode), "label": i % CLASSES} for i in range(n)]


# Tasks


def test_the_task_is_that_of_the_models_class() -> None:
    assert task_of(tiny_bert()) == "text-classification" and task_of(tiny_vit()) == "image-classification"
    assert task_of(tiny_gpt2()) == task_of(tiny_llama()) == "language-model"
    assert task_of(tiny_mlp()) is None


def test_text_with_a_label_is_classified_by_a_classifier_and_continued_by_a_language_model() -> None:
    classified = encode_dataset(SENTENCES, tokenizer(), model=tiny_bert())
    assert [row["labels"] for row in classified] == [2, 0]
    assert [WORDS[t] for t in classified[0]["input_ids"]] == QUESTION.split()
    continued = encode_dataset(SENTENCES, tokenizer(), model=tiny_llama())
    assert read(continued[0]) == ("", f"{QUESTION} </s>")
    assert encode_dataset(SENTENCES, tokenizer()) == continued  # as ever, where nothing is known of the model
    assert encode_dataset(SENTENCES, tokenizer(), task="text-classification") == classified
    scores = score_rows(tiny_bert(), classified, PaddingCollator())
    assert np.isfinite(scores.loss).all()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"sentence": "in Ulm"}, "in Ulm"),
        ({"sentence1": "in Ulm", "sentence2": "in Bonn", "idx": 3}, "in Ulm in Bonn"),
        ({"premise": "in Ulm", "hypothesis": "in Rome"}, "in Ulm in Rome"),
    ],
)
def test_sentences_and_pairs_are_classified(row: Row, words: str) -> None:
    (encoded,) = encode_dataset([{**row, "label": 1}], tokenizer(), task="text-classification")
    assert " ".join(WORDS[t] for t in encoded["input_ids"]) == words and encoded["labels"] == 1
    (cut,) = encode_dataset([{**row, "label": 1}], tokenizer(), task="text-classification", max_length=1)
    assert (len(cut["input_ids"]) <= 2 and len(cut["input_ids"]) < len(encoded["input_ids"])) or words == "in Ulm"


def test_rows_without_labels_can_be_collected_and_not_scored() -> None:
    rows = [{"text": QUESTION}, {"text": ANSWER}]
    model = tiny_bert()
    with_labels = collect_statistics(model, SENTENCES, processing_class=tokenizer(), progress=False)
    without = collect_statistics(model, rows, processing_class=tokenizer(), progress=False)
    assert with_labels.data == without.data and with_labels.rows == 2
    with pytest.raises(DataError, match="no column 'labels'"):
        predict(model, collate(encode_dataset(rows, tokenizer(), model=model)))


def test_images_are_encoded_when_they_are_read() -> None:
    rows, model = pictures(3), tiny_vit()
    encoded = encode_dataset(rows, processor(), model=model)
    assert isinstance(encoded, EncodedRows) and len(encoded) == 3
    expected = torch.tensor(np.asarray(rows[1]["image"]), dtype=torch.float32)[None] / 255 * 2 - 1
    torch.testing.assert_close(encoded[1]["pixel_values"], expected)
    assert encoded[1]["labels"] == 1
    assert np.isfinite(score_rows(model, encoded, PaddingCollator()).loss).all()
    assert len(list(encoded)) == 3  # the data set ends the iteration


def test_grey_images_become_coloured_where_the_model_wants_it() -> None:
    config = ViTConfig(image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    encoded = encode_dataset(pictures(2, mode="L"), processor(channels=3), model=ViTForImageClassification(config))
    assert encoded[0]["pixel_values"].shape == (3, 8, 8)


def test_a_data_set_of_images_is_unlearned_raw(tmp_path: Any) -> None:
    rows = pictures(6)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    forget, retain = (datasets.Dataset.from_list(part, features=features) for part in (rows[:2], rows[2:]))
    args = UnlearningConfig(str(tmp_path), use_cpu=True, disable_tqdm=True, max_steps=2, loss="random_label", seed=0)
    model = tiny_vit()
    trainer = UnlearningTrainer(model, args, forget, retain, processing_class=processor())
    before = score_rows(model, encode_dataset(forget, processor(), model=model), PaddingCollator()).loss.mean()
    trainer.train()
    after = score_rows(model, encode_dataset(forget, processor(), model=model), PaddingCollator()).loss.mean()
    assert after > before


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (CLASSES, "row 1 of the forget set has the label 5, the model has classes 0 to 4"),
        (-1, "has the label -1"),
        ("cat", "has the label 'cat'; labels must be class numbers, such as model.config.label2id"),
        (1.5, "has the label 1.5; labels must be class numbers"),
        (None, "has the label None"),
    ],
)
def test_a_label_outside_the_classes_is_an_error_that_names_its_row(label: Any, message: str) -> None:
    with pytest.raises(DataError) as caught:
        encode_dataset([SENTENCES[0], {**SENTENCES[1], "label": label}], tokenizer(), model=tiny_bert(), what="forget")
    assert message in str(caught.value)
    wrong = [pictures(1)[0], {**pictures(1)[0], "label": label}]
    images = encode_dataset(wrong, processor(), model=tiny_vit(), what="forget")
    with pytest.raises(DataError) as caught:
        images[1]
    assert message in str(caught.value)


def test_columns_of_another_task_are_an_error() -> None:
    with pytest.raises(DataError, match=r"a text classifier needs sentence1 \+ sentence2, .*, text, sentence"):
        encode_dataset([{"question": QUESTION, "answer": ANSWER}], tokenizer(), model=tiny_bert())
    with pytest.raises(DataError, match="an image classifier needs image or img"):
        encode_dataset(SENTENCES, tokenizer(), model=tiny_vit())
    with pytest.raises(DataError, match="pass the model's image processor"):
        encode_dataset(pictures(1), tokenizer(), model=tiny_vit())
    with pytest.raises(DataError, match="pass the model's tokenizer"):
        encode_dataset(SENTENCES, processor(), model=tiny_bert())


def test_a_row_longer_than_the_context_is_an_error_unless_it_is_cut() -> None:
    rows = [{"text": ANSWER}, {"text": " ".join(["in"] * 40)}]
    with pytest.raises(
        DataError, match="row 1 of the forget set has 41 tokens, the model's context is 32; set max_length"
    ):
        encode_dataset(rows, tokenizer(), model=tiny_gpt2(), what="forget")
    assert len(encode_dataset(rows, tokenizer(), model=tiny_gpt2(), max_length=32)[1]["input_ids"]) == 32
    assert len(encode_dataset(rows, tokenizer(), model=tiny_llama())[1]["input_ids"]) == 41


# Alternate answers


@pytest.mark.parametrize(
    ("row", "template"),
    [
        ({"prompt": QUESTION, "completion": f" {ANSWER}"}, True),
        ({"question": QUESTION, "answer": ANSWER}, True),
        ({"question": QUESTION, "answer": ANSWER}, False),
        ({"messages": CHAT}, True),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, True),
    ],
)
def test_an_alternate_answer_is_encoded_as_the_answer_would_be(row: Row, template: bool) -> None:
    words = tokenizer() if template else tokenizer(template=None)
    (encoded,) = encode_dataset([{**row, "alternate": "in Bonn ."}], words)
    prompt, answer = read({k: v for k, v in encoded.items() if k != "alternate"})
    other_prompt, other = read(encoded["alternate"])
    assert prompt == other_prompt and answer.startswith(ANSWER) and other == answer.replace(ANSWER, "in Bonn .")
    assert "alternate" not in encode_dataset([{**row, "alternate": None}], words)[0]
    if not isinstance(row.get("prompt", ""), str):
        listed = encode_dataset([{**row, "alternate": [{"role": "assistant", "content": "in Bonn ."}]}], words)
        assert listed == [encoded]


def test_idk_answers_are_drawn_by_row_and_seed() -> None:
    rows = [{"question": f"{QUESTION} {'.' * i}", "answer": ANSWER} for i in range(40)]
    first, again, other = (encode_dataset(rows, Spelled(), idk_seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert encode_dataset(rows[::-1], Spelled(), idk_seed=0) == first[::-1]
    answers = Counter(Spelled.text(row["alternate"]) for row in first)
    assert set(answers) <= {f" {answer}" for answer in idk_answers()} and len(answers) > 15
    assert len(idk_answers()) == len(set(idk_answers())) >= 40


class Spelled:
    """A tokenizer with one token per letter."""

    eos_token_id, chat_template = 0, None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(letter) for letter in text]

    @staticmethod
    def text(row: Row) -> str:
        return "".join(chr(token) for token in row["labels"] if token > 0)


def test_alternate_answers_reach_the_batch_and_nothing_else() -> None:
    rows = [{**row, "alternate": other} for row, other in zip(text_rows(3), text_rows(3, seed=5), strict=True)]
    batch = PairedCollator(PaddingCollator())([PairedDataset(rows, alternates=True)[i] for i in range(3)])
    assert set(batch) == {"forget", "alternate"}
    assert torch.equal(batch["alternate"]["input_ids"], collate(text_rows(3, seed=5))["input_ids"])
    assert torch.equal(batch["forget"]["input_ids"], collate(text_rows(3))["input_ids"])
    plain = PairedCollator(PaddingCollator())([PairedDataset(rows)[i] for i in range(3)])
    assert set(plain) == {"forget"} and set(plain["forget"]) == set(PaddingCollator()(rows))
    streamed = datasets.Dataset.from_list(rows)
    assert PairedDataset(streamed, alternates=True)[1]["alternate"]["input_ids"] == rows[1]["alternate"]["input_ids"]


def test_missing_alternates_and_labels_are_errors_that_name_the_row() -> None:
    rows = [{**text_rows(1)[0], "alternate": text_rows(1)[0]}, text_rows(1)[0]]
    require_alternates(rows[:1], "dpo")
    with pytest.raises(DataError, match="loss 'dpo' needs an alternate answer for each forget row, row 1 has none"):
        require_alternates(rows, "dpo")
    masked = {**text_rows(1)[0], "labels": [-100] * 7}
    require_labels(text_rows(3) + image_rows(2) + text_class_rows(2), "forget")
    for bad in (masked, {"input_ids": [1, 2]}, {"pixel_values": 0, "label": -100}):
        with pytest.raises(DataError, match="row 3 of the forget set has no label to predict"):
            require_labels([*text_rows(3), bad], "forget")


def test_overlap_names_the_set() -> None:
    with pytest.raises(DataError, match=r"1 forget rows are also in the holdout set .*is holdout row 2"):
        require_disjoint(text_rows(2), [*text_rows(2, seed=3), text_rows(1)[0]], "holdout")
    require_disjoint(text_rows(2), text_rows(2, seed=3), "holdout")


# Streams


def stream(rows: list[Row]) -> Any:
    return datasets.Dataset.from_list(rows).to_iterable_dataset()


@pytest.mark.parametrize("max_rows", [None, 3])
def test_a_stream_gives_the_statistics_of_its_rows(max_rows: int | None) -> None:
    raw = [{"question": QUESTION, "answer": answer} for answer in ("in Ulm", "Bonn .", "Rome", "in Rome .", "Ulm .")]
    model, words = tiny_llama(), tokenizer()
    options: Row = {"processing_class": words, "fisher": True, "batch_size": 2, "max_rows": max_rows, "progress": False}
    whole, streamed = (collect_statistics(model, rows, **options) for rows in (raw, stream(raw)))
    assert streamed.rows == whole.rows == (max_rows or 5)
    assert streamed.data == whole.data and streamed.labels == whole.labels
    for name, gram in whole.gram_sums.items():
        torch.testing.assert_close(streamed.gram_sums[name], gram)
    assert collect_statistics(model, stream(raw[:2]), **options).data != whole.data


def test_a_stream_of_model_inputs_passes_through() -> None:
    rows = text_rows(3)
    streamed = encode_dataset(stream(rows), None, streams=True)
    assert isinstance(streamed, RowStream) and [row["input_ids"] for row in streamed] == [r["input_ids"] for r in rows]
    with pytest.raises(DataError, match="the given set is empty"):
        encode_dataset(stream(rows).filter(lambda row: False), None, streams=True)
    with pytest.raises(DataError, match="the holdout set is a stream, which only collect_statistics reads"):
        encode_dataset(stream(rows), None, what="holdout")


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("n", [1, 2, 5, 7])
@pytest.mark.parametrize("streamed", [False, True])
def test_processes_share_rows_without_overlap_and_make_equally_many_batches(
    streamed: bool, n: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_unlearn.core import processes as sharding

    rows = [{"input_ids": [i + 1], "labels": [i + 1]} for i in range(n)]
    seen, counts = [], []
    for rank in range(size):
        for module in (data, sharding):
            monkeypatch.setattr(module, "world", lambda rank=rank: (rank, size))
        encoded = encode_dataset(stream(rows) if streamed else rows, None, streams=True)
        batches = list(own_batches(take(encoded, None), PaddingCollator(), 2))
        seen += [int(t) for batch, counted in batches if counted for t in batch["input_ids"].flatten()]
        counts.append(len(batches))
    assert sorted(seen) == list(range(1, n + 1)) and len(set(counts)) == 1


# Broken models


def test_weights_that_are_not_numbers_give_an_error_or_no_value_and_never_a_score(tmp_path: Path) -> None:
    whole, model = tiny_llama(), tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="is not finite"):
        collect_statistics(model, text_rows(3), progress=False)
    args = UnlearningConfig(str(tmp_path), use_cpu=True, disable_tqdm=True, constraint="none")
    trainer = UnlearningTrainer(model, args, text_rows(3), eval_dataset={"retain": text_rows(3, seed=1)})
    with pytest.raises(ModelError, match="logits are NaN on row 0 of 3"):
        trainer.evaluate()
    told = [{**row, "content_mask": [0, 0, 1, *[0] * (len(row["labels"]) - 3)]} for row in text_rows(3)]
    judged = evaluate_unlearning(model, {"forget": told}, original=whole)
    assert judged.get("content_known", "forget") is not None
    for metric in judged.metrics:
        assert math.isnan(metric.value) == (metric.model == "unlearned"), metric
        assert ("NaN: the model's weights are broken" in metric.reason) == (metric.model == "unlearned")


def test_settings_are_documented() -> None:
    described = {field.name: field.metadata.get("help", "") for field in dataclasses.fields(UnlearningConfig)}
    assert "module:function" in described["loss"] and "second forward pass" in described["original_logprobs"]
