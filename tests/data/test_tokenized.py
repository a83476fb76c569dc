"""Laws of rows that are tokens already, in the layouts of trl's `SFTTrainer`: their labels are those that it trains on,
wherever rows are read, and packed rows are refused. The layouts are made by hand, because trl may be missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel

from helpers.tiny import Row, text_class_rows, text_rows, tiny_bert, tiny_llama
from hf_unlearn import UnlearningConfig, UnlearningTrainer
from hf_unlearn.data.batches import PaddingCollator
from hf_unlearn.data.encoding import encode_dataset
from hf_unlearn.errors import DataError
from hf_unlearn.evaluation.attacks.auditing import audit
from hf_unlearn.evaluation.evaluate import evaluate_unlearning, training_metrics
from hf_unlearn.evaluation.row_scores import score_rows
from hf_unlearn.statistics.collect import collect_statistics

PLAIN = text_rows(6)
"""Labels on all tokens but the first two."""
SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def masked(row: Row, **columns: Any) -> Row:
    return {"prompt": "a", "completion": " b", "input_ids": row["input_ids"], **columns}


def answer_mask(row: Row) -> list[int]:
    return [0, 0] + [1] * (len(row["input_ids"]) - 2)


LAYOUTS: dict[str, Callable[[Row], Row]] = {
    "completion": lambda row: masked(row, completion_mask=answer_mask(row)),
    "assistant": lambda row: masked(row, assistant_masks=answer_mask(row)),
    "both": lambda row: masked(
        row, completion_mask=answer_mask(row), assistant_masks=[0] + [1] * (len(row["labels"]) - 1)
    ),
    "labels and mask": lambda row: masked(row, labels=row["input_ids"], completion_mask=answer_mask(row)),
    "labels": lambda row: masked(row, labels=row["labels"]),
    "a class besides": lambda row: masked(row, label=3, completion_mask=answer_mask(row)),
    "arrays": lambda row: masked(
        row | {"input_ids": np.array(row["input_ids"])}, completion_mask=torch.tensor(answer_mask(row)).bool()
    ),
}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_labels_are_those_in_the_masks_wherever_rows_are_read(layout: str, tmp_path: Path) -> None:
    rows, model = [LAYOUTS[layout](row) for row in PLAIN], tiny_llama()
    for row, plain in zip(encode_dataset(rows, None, model=model), PLAIN, strict=True):
        assert row["labels"] == plain["labels"] and "completion_mask" not in row
    scores = [score_rows(model, given, PaddingCollator()).loss.tolist() for given in (rows, PLAIN)]
    assert scores[0] == scores[1]
    whole = [{"input_ids": row["input_ids"]} for row in PLAIN]
    assert score_rows(model, whole, PaddingCollator()).loss.tolist() != scores[1]
    numbers = [evaluate_unlearning(model, {"forget": given}).metrics for given in (rows, PLAIN)]
    assert numbers[0] == numbers[1]
    computed = [training_metrics({"forget": given}, ["exact_memorisation"])(model) for given in (rows, PLAIN)]
    assert computed[0] == computed[1]
    sums = [collect_statistics(model, given, fisher=True, progress=False) for given in (rows, PLAIN)]
    assert sums[0].data == sums[1].data and sums[0].labels == sums[1].labels
    assert all(torch.equal(sums[0].fisher_sums[name], total) for name, total in sums[1].fisher_sums.items())
    trained = []
    for given in (rows, PLAIN):
        model = tiny_llama()
        args = UnlearningConfig(str(tmp_path), max_steps=2, use_cpu=True, disable_tqdm=True)
        trainer = UnlearningTrainer(model, args, given[:2], given[2:4], holdout_dataset=given[4:])
        trainer.train()
        assert trainer.evaluate(given[:2]) is not None
        trained.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*trained)


@pytest.mark.parametrize("form", [list, datasets.Dataset.from_list])
def test_without_masks_every_token_is_a_label(form: Callable[[list[Row]], Any]) -> None:
    rows = form([{"text": "a", "input_ids": row["input_ids"]} for row in PLAIN])
    expected = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in PLAIN]
    encoded = encode_dataset(rows, None, model=tiny_llama())
    assert [row["labels"] for row in encoded] == [row["labels"] for row in expected]
    losses = [score_rows(tiny_llama(), given, PaddingCollator()).loss.tolist() for given in (rows, expected)]
    assert losses[0] == losses[1]
    alternate = [{**expected[0], "alternate": {"input_ids": [3, 4, 5], "completion_mask": [0, 1, 1]}}]
    unlabelled = [{"input_ids": expected[0]["input_ids"], "alternate": alternate[0]["alternate"]}]
    assert encode_dataset(unlabelled, None)[0]["alternate"] == {"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}


def test_streams_get_the_same_labels() -> None:
    rows = datasets.Dataset.from_list([LAYOUTS["completion"](row) for row in PLAIN])
    streamed = list(encode_dataset(rows.to_iterable_dataset(), None, model=tiny_llama(), streams=True))
    assert [row["labels"] for row in streamed] == [row["labels"] for row in PLAIN]


def test_rows_of_other_tasks_get_no_labels() -> None:
    unlabelled = [{"input_ids": row["input_ids"]} for row in PLAIN]
    for model in (tiny_bert(), BertForMaskedLM(BertConfig(**SIZES)), BertLMHeadModel(BertConfig(**SIZES))):
        assert encode_dataset(unlabelled, None, model=model) is unlabelled
        with pytest.raises(DataError, match="has no column 'labels'"):
            score_rows(model, unlabelled, PaddingCollator())
    classes = [row | {"label": row["labels"]} for row in text_class_rows(2)]
    classes = [{name: value for name, value in row.items() if name != "labels"} for row in classes]
    assert encode_dataset(classes, None) is classes
    assert encode_dataset(classes, None, model=tiny_bert()) is classes
    answers = [LAYOUTS["completion"](PLAIN[0])]
    with pytest.raises(DataError, match="would only copy its labels"):
        encode_dataset(answers, None, model=BertLMHeadModel(BertConfig(**SIZES)))


READERS: dict[str, Callable[[Any, Path], object]] = {
    "encode": lambda rows, folder: encode_dataset(rows, None),
    "score": lambda rows, folder: score_rows(tiny_llama(), rows, PaddingCollator()),
    "evaluate": lambda rows, folder: evaluate_unlearning(tiny_llama(), {"forget": rows}),
    "audit": lambda rows, folder: audit(tiny_llama(), {"forget": rows}, attacks=["quantisation"]),
    "collect": lambda rows, folder: collect_statistics(tiny_llama(), rows, progress=False),
    "stream": lambda rows, folder: collect_statistics(
        tiny_llama(), datasets.Dataset.from_list(rows).to_iterable_dataset(), progress=False
    ),
    "forget": lambda rows, folder: UnlearningTrainer(tiny_llama(), settings(folder), rows, PLAIN[4:]),
    "retain": lambda rows, folder: UnlearningTrainer(tiny_llama(), settings(folder), PLAIN[4:], rows),
    "holdout": lambda rows, folder: UnlearningTrainer(
        tiny_llama(), settings(folder), PLAIN[:1], PLAIN[1:2], holdout_dataset=rows
    ),
}


def settings(folder: Path) -> UnlearningConfig:
    return UnlearningConfig(str(folder), max_steps=1, use_cpu=True, disable_tqdm=True)


@pytest.mark.parametrize("reader", list(READERS))
@pytest.mark.parametrize(
    ("columns", "texts"),
    [
        ({"seq_lengths": [2, 3]}, 2),
        ({"seq_lengths": [2, 3], "labels": [9, 8, 7, 6, 5]}, 2),
        ({"position_ids": [0, 1, 0, 1, 0]}, 3),
        ({"seq_lengths": np.array([1, 4]), "completion_mask": [0, 1, 1, 1, 1]}, 2),
    ],
)
def test_packed_rows_are_refused(reader: str, columns: Row, texts: int, tmp_path: Path) -> None:
    name = next(iter(columns))
    whole = {"seq_lengths": [4], "position_ids": [0, 1, 2, 3]}[name]
    first: Row = {"input_ids": [9, 8, 7, 6], name: whole}
    first |= {other: value[:4] for other, value in columns.items() if other != name}
    rows = [first, {"input_ids": [9, 8, 7, 6, 5], **columns}]
    with pytest.raises(DataError, match=f"row 1 of the .* set is packed: it holds {texts} texts .*one unit to forget"):
        READERS[reader](rows, tmp_path)
    READERS["encode"](rows[:1], tmp_path)


def test_positions_of_padded_rows_do_not_look_packed() -> None:
    padded = {"input_ids": [0, 0, 5, 6], "attention_mask": [0, 0, 1, 1], "position_ids": [1, 1, 0, 1]}
    rows = [padded | {"labels": [-100, -100, -100, 6]}]
    assert encode_dataset(rows, None) is rows


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"completion_mask": [0, 1]}, "5 tokens and 2 values in column 'completion_mask'"),
        ({"completion_mask": None}, "None in column 'completion_mask'"),
        ({}, "None in column 'completion_mask'"),
        ({"completion_mask": [0.0, 0.5, 0.5, 1.0, 1.0]}, "not a list of whole numbers"),
        ({"completion_mask": "01111"}, "not a list of whole numbers"),
        ({"completion_mask": [0, 1, 1, 1, 1], "input_ids": None}, "None in column 'input_ids'"),
    ],
)
def test_a_mask_that_does_not_fit_is_an_error_that_names_the_row(columns: Row, reason: str) -> None:
    good = {"input_ids": [5, 6, 7, 8, 9], "completion_mask": [0, 1, 1, 1, 1]}
    bad = {"input_ids": [5, 6, 7, 8, 9], **columns}
    with pytest.raises(DataError, match=rf"row 1 of the forget set has .*{reason}"):
        encode_dataset([good, bad], None, what="forget")


def test_a_mask_without_a_token_to_predict_is_an_error_before_training(tmp_path: Path) -> None:
    rows = [{"input_ids": [5, 6, 7], "completion_mask": [0, 0, 0]}]
    with pytest.raises(DataError, match="row 0 of the forget set has no label to predict"):
        UnlearningTrainer(tiny_llama(), settings(tmp_path), rows, PLAIN)
