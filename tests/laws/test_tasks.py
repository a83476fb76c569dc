"""Token classification and seq2seq from raw rows to unlearning; what is wrong with rows is said in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import model_kinds as kinds
from helpers.texts import WORDS, tokenizer
from helpers.tiny import CLASSES, image_rows, sharpen, tiny_vit
from hf_unlearn.data.batches import default_collator
from hf_unlearn.data.encoding import encode_dataset
from hf_unlearn.errors import DataError, ModelError
from hf_unlearn.models.forward import predict
from hf_unlearn.models.loading import load_model, load_processor
from hf_unlearn.models.tasks import task_of
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.trainer.config import UnlearningConfig
from hf_unlearn.trainer.trainer import UnlearningTrainer

SENTENCE = [word for word in WORDS if not word.startswith("<")][:6]
PAIRS = [{"source": " ".join(SENTENCE[:n]), "target": " ".join(SENTENCE[n:])} for n in (1, 2, 3, 4)]
TAGGED = [{"tokens": SENTENCE[:n], "ner_tags": [i % CLASSES for i in range(n)]} for n in (2, 3, 4, 5)]


def tagger() -> Any:
    from transformers import BertConfig, BertForTokenClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=32,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return sharpen(BertForTokenClassification(config))


def translator() -> Any:
    torch.manual_seed(0)
    model = kinds.t5()
    model.resize_token_embeddings(len(WORDS))
    return sharpen(model, 2.0)


MODELS = {"token-classification": (tagger, TAGGED), "seq2seq": (translator, PAIRS)}


def test_each_words_first_token_has_its_class() -> None:
    with_start = tokenizer(bos=True)
    row = {"tokens": [f"{SENTENCE[0]} {SENTENCE[1]}", SENTENCE[2]], "ner_tags": [3, 1]}
    (found,) = encode_dataset([row], with_start, task="token-classification")
    assert found["labels"] == [-100, 3, -100, 1]
    assert found["input_ids"][1:] == with_start.encode(" ".join(SENTENCE[:3]))[1:]


def test_a_pair_becomes_inputs_and_labels() -> None:
    (found,) = encode_dataset(PAIRS[1:2], tokenizer(), task="seq2seq")
    assert found["input_ids"] == [WORDS.index(word) for word in SENTENCE[:2]]
    assert found["labels"] == [WORDS.index(word) for word in SENTENCE[2:]]
    assert found["attention_mask"] == [1, 1]


@pytest.mark.parametrize("task", MODELS)
def test_a_run_from_raw_rows_and_the_folder_loads_by_its_task(task: Any, tmp_path: Path) -> None:
    make, rows = MODELS[task]
    model, words = make(), tokenizer()
    assert task_of(model) == task
    retain, forget = encode_dataset(rows[:2], words, model=model), encode_dataset(rows[2:], words, model=model)
    statistics = collect_statistics(model, retain, progress=False)
    batches = [default_collator(words)(part) for part in (retain, forget)]
    before = [predict(model, batch).logits_LV.detach() for batch in batches]
    args = UnlearningConfig(
        str(tmp_path / "out"),
        loss="grad_ascent",
        constraint="energy",
        constraint_settings={"energy": 1.0},
        learning_rate=3e-3,
        max_steps=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = UnlearningTrainer(model, args, rows[2:], statistics=statistics, processing_class=words)
    trainer.train()
    after = [predict(model.eval(), batch).logits_LV.detach() for batch in batches]
    assert (after[0] - before[0]).abs().max() < 1e-4
    assert (after[1] - before[1]).abs().max() > 1e-2
    model.save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    assert type(load_model(str(tmp_path / "model"), task)) is type(model)
    named = UnlearningTrainer(str(tmp_path / "model"), args, rows[2:], retain_dataset=rows[:2])
    assert type(named.model) is type(model) and len(named.processing_class) == len(WORDS)
    assert len(load_processor(str(tmp_path / "model"), task)) == len(WORDS)


@pytest.mark.parametrize(
    ("task", "row", "words"),
    [
        ("token-classification", {"tokens": SENTENCE[:2], "ner_tags": [1]}, "2 words and 1 ner_tags"),
        ("token-classification", {"tokens": SENTENCE[:2], "ner_tags": [1, CLASSES]}, "has classes 0 to 4"),
        ("token-classification", {"tokens": SENTENCE[:2], "ner_tags": ["B-PER", "O"]}, "must be class numbers"),
        ("token-classification", {"text": "a"}, "a token classifier needs tokens or words"),
        ("seq2seq", {"source": SENTENCE[0], "target": ""}, "no token to predict: its target is empty"),
        ("seq2seq", {"text": SENTENCE[0]}, "a seq2seq model needs one of: source"),
    ],
)
def test_rows_that_do_not_fit_are_named(task: Any, row: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        encode_dataset([row], tokenizer(), model=MODELS[task][0]())


def test_images_of_another_number_of_channels_are_named() -> None:
    rows = [row | {"pixel_values": row["pixel_values"].expand(3, 8, 8)} for row in image_rows(2)]
    for make in (tiny_vit, kinds.drawn(kinds.resnet)):
        with pytest.raises(DataError, match=r"the images have 3 channels .*the model takes 1; use the model's own"):
            collect_statistics(make(), rows, progress=False)


def test_classes_that_the_model_has_not_are_named() -> None:
    batch = default_collator(None)([row | {"labels": CLASSES} for row in image_rows(2)])
    with pytest.raises(DataError, match=f"{CLASSES}"):
        predict(tiny_vit(), batch)


def test_a_missing_processor_is_named(tmp_path: Path) -> None:
    tiny_vit().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="cannot load the image processor of"):
        load_processor(str(tmp_path), "image-classification")
    args = UnlearningConfig(str(tmp_path / "out"), use_cpu=True)
    with pytest.raises(ModelError, match=r"cannot load .* and its processor"):
        UnlearningTrainer(str(tmp_path), args, image_rows(2), retain_dataset=image_rows(2))
    images = [{"image": object(), "label": 0}]
    with pytest.raises(DataError, match="pass the model's image processor"):
        encode_dataset(images, None, model=tiny_vit())
