"""Laws of columns that nothing reads: they reach no forward pass and change nothing, in any task. Negative control: a
column that the model's forward pass names does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForTokenClassification, T5Config, T5ForConditionalGeneration

from helpers.tiny import (
    CASES,
    CLASSES,
    VOCABULARY,
    Row,
    sharpen,
    text_rows,
    tiny_llama,
)
from hf_unlearn import UnlearningConfig, UnlearningTrainer
from hf_unlearn.data.batches import PaddingCollator
from hf_unlearn.data.row_identity import batch_hashes
from hf_unlearn.deletion.fine_tuning import FineTuning
from hf_unlearn.errors import DataError
from hf_unlearn.evaluation.attacks.inputs import hidden_means
from hf_unlearn.evaluation.attacks.subject import AuditSettings, Subject
from hf_unlearn.evaluation.evaluate import evaluate_unlearning
from hf_unlearn.evaluation.measurements import MeasurementTools
from hf_unlearn.evaluation.row_scores import score_rows
from hf_unlearn.models.arguments import taken_inputs
from hf_unlearn.statistics.collect import collect_statistics

BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def token_classifier() -> Any:
    torch.manual_seed(0)
    return sharpen(BertForTokenClassification(BertConfig(**BERT, num_labels=CLASSES)))


def token_class_rows(n: int, seed: int = 0) -> list[Row]:
    return [row | {"labels": [token % CLASSES for token in row["input_ids"]]} for row in text_rows(n, seed)]


def tiny_t5() -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0}
    config = T5Config(vocab_size=VOCABULARY, **sizes, decoder_start_token_id=0, pad_token_id=0)
    return T5ForConditionalGeneration(config).eval()


def seq2seq_rows(n: int, seed: int = 0) -> list[Row]:
    return [row | {"labels": row["input_ids"][::-1]} for row in text_rows(n, seed)]


MODELS: dict[str, Any] = CASES | {"tokens": (token_classifier, token_class_rows), "t5": (tiny_t5, seq2seq_rows)}
del MODELS["mlp"]  # takes any argument


def with_columns(rows: Sequence[Row], values: Mapping[str, Sequence[Any]]) -> list[Row]:
    return [row | {name: value[index] for name, value in values.items()} for index, row in enumerate(rows)]


EXTRA: dict[str, list[Any]] = {
    "idx": [3, 1, 4, 1],
    "score": [0.5, 1.5, 2.5, 3.5],
    "length": [7, 4, 9, 6],
    "flags": [True, False, True, False],
    "spans": [[1, 2], [3], [4, 5, 6], [7]],
    "boxes": [[[1, 2]], [[3, 4], [5, 6]], [[7, 8]], [[9, 10]]],
    "ragged": [[[1], [2, 3]], [[1]], [[4], [5]], [[6]]],
    "large": [1 << 70, 1, 2, 3],
    "note": ["a", "b", "c", "d"],
    "date": [None, None, None, 1],
}


@pytest.mark.parametrize("name", list(MODELS))
def test_columns_that_nothing_reads_change_nothing(name: str, tmp_path: Path) -> None:
    make, make_rows = MODELS[name]
    model, plain = make(), make_rows(4)
    extra = with_columns(plain, EXTRA)
    scores = [score_rows(model, rows, PaddingCollator(), 2).loss.tolist() for rows in (plain, extra)]
    assert scores[0] == scores[1]
    sums = [collect_statistics(model, rows, fisher=True, progress=False) for rows in (plain, extra)]
    assert sums[0].data == sums[1].data and sums[0].rows == 4
    reports = [evaluate_unlearning(model, {"forget": rows}).metrics for rows in (plain, extra)]
    assert reports[0] == reports[1]
    weights = []
    for rows in (plain, extra):
        model = make()
        args = UnlearningConfig(str(tmp_path), max_steps=2, use_cpu=True, disable_tqdm=True, constraint="ridge")
        trainer = UnlearningTrainer(model, args, rows[:2], rows[2:], eval_dataset={"retain": rows[2:]})
        trainer.train()
        trainer.evaluate()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_the_original_computation_of_metrics_gets_no_other_columns(tmp_path: Path) -> None:
    rows = with_columns(text_rows(4), EXTRA)
    args = UnlearningConfig(str(tmp_path), max_steps=1, use_cpu=True, disable_tqdm=True)
    trainer = UnlearningTrainer(
        tiny_llama(), args, rows[:2], rows[2:], eval_dataset={"retain": rows[2:]}, compute_metrics=lambda p: {"a": 1.0}
    )
    assert trainer.evaluate()["eval_retain_a"] == 1.0


@pytest.mark.parametrize("name", ["llama", "bert", "vit"])
def test_fine_tuning_and_probes_get_no_other_columns(name: str, tmp_path: Path) -> None:
    make, make_rows = MODELS[name]
    plain = make_rows(4)
    weights, states = [], []
    for rows in (plain, with_columns(plain, EXTRA)):
        model = make()
        tools = MeasurementTools(PaddingCollator())
        states.append(torch.as_tensor(hidden_means(Subject(model, {"forget": rows}, tools, AuditSettings()), rows)))
        FineTuning(epochs=1, learning_rate=1e-3, batch_size=2, seed=0).run(model, rows, PaddingCollator(), tmp_path)
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights) and torch.equal(*states)


class Shifted(nn.Module):
    """A classifier whose forward pass names a column of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3)

    def forward(self, pixel_values: Tensor, score: Tensor) -> Tensor:
        return self.layer(pixel_values) * score.unsqueeze(1)


def test_a_column_that_the_forward_pass_names_reaches_it() -> None:
    rows = [{"pixel_values": [1.0, 2.0], "labels": 0, "score": score, "idx": 9} for score in (1.0, 5.0)]
    torch.manual_seed(0)
    first, second = score_rows(Shifted(), rows, PaddingCollator()).loss
    assert first != second
    batch = PaddingCollator()(rows)
    assert set(taken_inputs(Shifted(), batch)) == {"pixel_values", "labels", "score"}
    usual = {"input_ids": torch.tensor([[1]]), "position_ids": torch.tensor([[0]]), "token_type_ids": torch.ones(1, 1)}
    assert taken_inputs(tiny_llama(), usual).keys() == usual.keys()
    assert batch_hashes(taken_inputs(Shifted(), batch)) != batch_hashes(batch)


def test_images_of_unequal_sizes_are_an_error_that_names_the_column() -> None:
    rows = [{"pixel_values": torch.zeros(1, size, 8), "labels": 0} for size in (8, 9)]
    with pytest.raises(DataError, match=r"sizes \[1, 8, 8\] and \[1, 9, 8\] in column 'pixel_values'"):
        PaddingCollator()(rows)
