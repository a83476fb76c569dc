"""Laws of the evaluation: every number of the report is the mean of scores computed here another way, with its n and
interval, for every model given; the report survives a file. Each law has a negative control."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from helpers import reference_losses as reference
from helpers.tiny import CASES, collate, image_rows, text_rows, tiny_bert, tiny_gpt2, tiny_mlp, tiny_vit, vector_rows
from hf_unlearn.errors import DataError, SettingsError
from hf_unlearn.evaluation.evaluate import evaluate_unlearning
from hf_unlearn.evaluation.metrics.registry import SUITES
from hf_unlearn.evaluation.report import UnlearningReport
from hf_unlearn.models.forward import output_logits
from hf_unlearn.models.tasks import shifts_labels

MODELS = ("original", "unlearned", "retrained")
SIZES = {"forget": 5, "retain": 7, "holdout": 6}
COLUMNS = {"loss": 0, "answer_probability": 1, "accuracy": 2, "entropy": 3}


def make(case: str) -> tuple[dict[str, nn.Module], dict[str, list]]:
    model, rows = CASES[case]
    models = {kind: model(seed) for seed, kind in enumerate(MODELS)}
    return models, {name: rows(n, seed) for seed, (name, n) in enumerate(SIZES.items())}


def evaluate(models: dict[str, nn.Module], splits: dict[str, list], **options: Any) -> UnlearningReport:
    others = {kind: models[kind] for kind in ("original", "retrained") if kind in models}
    return evaluate_unlearning(models["unlearned"], splits, **(others | options))


def twin_scores(model: nn.Module, rows: list[dict]) -> np.ndarray:
    batch = collate(rows)
    with torch.no_grad():
        logits = output_logits(model, batch).numpy()
    shifted = shifts_labels(model)
    return reference.row_scores(reference.labelled(logits, batch["labels"].numpy(), shifted=shifted))


# Numbers


@pytest.mark.parametrize("case", ["llama", "vit"])
def test_every_metric_of_every_split_and_model_equals_its_twin(case: str) -> None:
    models, splits = make(case)
    report = evaluate(models, splits, batch_size=3)
    for kind, model in models.items():
        scores = {name: twin_scores(model, rows) for name, rows in splits.items()}
        for metric, column in COLUMNS.items():
            for split, n in SIZES.items():
                result = report.get(metric, split, kind)
                assert result is not None and result.n == n
                assert result.value == pytest.approx(scores[split][:, column].mean(), rel=1e-4, abs=1e-5)
                assert result.low is not None and result.high is not None and result.low <= result.value <= result.high
        attack = report.get("membership_auc", "forget", kind)
        losses = np.concatenate([scores["forget"][:, 0], scores["holdout"][:, 0]])
        truth = [1] * SIZES["forget"] + [0] * SIZES["holdout"]
        assert attack is not None and attack.n == SIZES["forget"] + SIZES["holdout"]
        assert attack.value == pytest.approx(roc_auc_score(truth, -losses))
        np.testing.assert_allclose(report.entropies[kind], scores["forget"][:, 3], rtol=1e-4, atol=1e-5)
    content = 3 * 2 if shifts_labels(models["original"]) else 0  # three more of forget and held-out answers
    assert len(report.metrics) == len(MODELS) * (len(COLUMNS) * len(SIZES) + 1 + content)
    by_model = [report.get("loss", "forget", kind).value for kind in MODELS]  # type: ignore[union-attr]
    assert len({round(value, 3) for value in by_model}) == 3  # the models do differ


def test_only_the_models_given_are_measured() -> None:
    models, splits = make("mlp")
    assert evaluate(models, splits).models == list(MODELS)
    assert evaluate({"unlearned": models["unlearned"]}, splits).models == ["unlearned"]
    assert evaluate({k: models[k] for k in ("unlearned", "retrained")}, splits).models == ["unlearned", "retrained"]
    assert evaluate({"unlearned": models["unlearned"]}, splits).get("loss", "forget", "original") is None


def test_only_the_metrics_asked_for_are_measured() -> None:
    models, splits = make("mlp")
    result = evaluate(models, splits, metrics=("accuracy", "membership_auc")).metrics
    assert {m.name for m in result} == {"accuracy", "membership_auc"}
    assert {m.name for m in evaluate(models, splits).metrics} == set(SUITES["default"])


def test_membership_needs_held_out_rows() -> None:
    models, splits = make("mlp")
    holdout = splits.pop("holdout")
    assert evaluate(models, splits).get("membership_auc", "forget") is None
    assert evaluate(models, splits | {"holdout": holdout}).get("membership_auc", "forget") is not None


def test_a_single_forget_row_can_be_evaluated() -> None:
    models, splits = make("mlp")
    report = evaluate(models, splits | {"forget": splits["forget"][:1]})
    attack, loss = report.get("membership_auc", "forget"), report.get("loss", "forget")
    assert attack is not None and attack.n == 1 + SIZES["holdout"] and loss is not None and loss.n == 1


def test_numbers_are_a_function_of_the_seed_and_carry_it() -> None:
    models, splits = make("mlp")
    one, again, other = (evaluate(models, splits, seed=seed).metrics for seed in (4, 4, 5))
    assert one == again and {m.seed for m in one} == {4}
    assert [m.value for m in one] == [m.value for m in other] and [m.low for m in one] != [m.low for m in other]


def test_raw_rows_are_encoded_with_the_processor() -> None:
    class letters:
        """A tokenizer of letters."""

        eos_token_id, pad_token_id, chat_template = 0, 0, None

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [1 + ord(letter) % 20 for letter in text]

    model, raw = tiny_gpt2(), [{"prompt": "who", "completion": "ann"}, {"prompt": "what", "completion": "a cat"}]
    tokens = [(letters().encode(r["prompt"]), [*letters().encode(r["completion"]), 0]) for r in raw]
    encoded = [{"input_ids": p + c, "labels": [-100] * len(p) + c} for p, c in tokens]
    mine = evaluate_unlearning(model, {"forget": raw}, processing_class=letters()).metrics
    assert mine == evaluate_unlearning(model, {"forget": encoded}).metrics
    with pytest.raises(DataError, match="pass the model's tokenizer"):
        evaluate_unlearning(model, {"forget": raw})


# Scopes


def test_the_original_model_may_be_a_scope_around_the_same_model() -> None:
    models, splits = make("vit")
    model, weights = tiny_vit(1), tiny_vit(0).state_dict()

    @contextmanager
    def original() -> Iterator[nn.Module]:
        mine = {key: value.clone() for key, value in model.state_dict().items()}
        model.load_state_dict(weights)
        try:
            yield model
        finally:
            model.load_state_dict(mine)

    by_scope = evaluate_unlearning(model, splits, original=original)
    by_model = evaluate_unlearning(models["unlearned"], splits, original=models["original"])
    assert by_scope.metrics == by_model.metrics
    assert by_scope.get("loss", "forget", "original") != by_scope.get("loss", "forget", "unlearned")
    assert all(torch.equal(model.state_dict()[key], value) for key, value in tiny_vit(1).state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_models_keep_their_training_mode(training: bool) -> None:
    models, splits = make("mlp")
    for model in models.values():
        model.train(training)
    evaluate(models, splits)
    assert {model.training for model in models.values()} == {training}


# Errors


def test_a_split_named_forget_is_required() -> None:
    with pytest.raises(DataError, match=r"the splits are \['holdout', 'train'\]; one must be named 'forget'"):
        evaluate_unlearning(tiny_mlp(), {"train": vector_rows(2), "holdout": vector_rows(2)})


def test_an_unknown_metric_names_the_known_ones() -> None:
    known = r"unknown metric 'rouge'; did you mean 'rouge_l'\? choose from accuracy, .*membership_auc"
    with pytest.raises(SettingsError, match=known):
        evaluate_unlearning(tiny_mlp(), {"forget": vector_rows(2)}, metrics=["loss", "rouge"])


@pytest.mark.parametrize("split", ["forget", "holdout"])
def test_an_empty_split_is_an_error_that_names_it(split: str) -> None:
    with pytest.raises(DataError, match=f"the {split} set is empty"):
        evaluate_unlearning(tiny_mlp(), {"forget": vector_rows(2), split: []})


def test_rows_without_labels_are_an_error() -> None:
    with pytest.raises(DataError, match="no column 'labels'"):
        evaluate_unlearning(tiny_bert(), {"forget": text_rows(2, labels=False)})


def test_rows_of_images_are_evaluated() -> None:
    report = evaluate_unlearning(tiny_vit(), {"forget": image_rows(3), "holdout": image_rows(3, 1)})
    assert {m.name for m in report.metrics} == set(SUITES["default"]) and report.versions and report.hardware
