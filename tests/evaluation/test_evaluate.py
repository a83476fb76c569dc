"""Laws of the evaluation: every number of the report is the mean of scores computed here another way, with its n and
interval, for every model given; the report survives a file. Each law has a negative control."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import reference_losses as reference
from helpers.tiny import CASES, collate, image_rows, text_rows, tiny_gpt2, tiny_mlp, tiny_vit, vector_rows
from sklearn.metrics import roc_auc_score
from torch import nn

from hf_unlearn.errors import DataError, OutputError, SettingsError
from hf_unlearn.evaluation.evaluate import evaluate_unlearning
from hf_unlearn.evaluation.metrics.registry import SUITES
from hf_unlearn.evaluation.report import FORMAT_VERSION, REPORT, MetricValue, UnlearningReport
from hf_unlearn.evaluation.tables import side_by_side
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
                found = report.get(metric, split, kind)
                assert found is not None and found.n == n
                assert found.value == pytest.approx(scores[split][:, column].mean(), rel=1e-4, abs=1e-5)
                assert found.low is not None and found.high is not None and found.low <= found.value <= found.high
        attack = report.get("membership_auc", "forget", kind)
        losses = np.concatenate([scores["forget"][:, 0], scores["holdout"][:, 0]])
        truth = [1] * SIZES["forget"] + [0] * SIZES["holdout"]
        assert attack is not None and attack.n == SIZES["forget"] + SIZES["holdout"]
        assert attack.value == pytest.approx(roc_auc_score(truth, -losses))
        np.testing.assert_allclose(report.entropies[kind], scores["forget"][:, 3], rtol=1e-4, atol=1e-5)
    assert len(report.metrics) == len(MODELS) * (len(COLUMNS) * len(SIZES) + 1)
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
    found = evaluate(models, splits, metrics=("accuracy", "membership_auc")).metrics
    assert {m.name for m in found} == {"accuracy", "membership_auc"}
    assert {m.name for m in evaluate(models, splits).metrics} == set(SUITES["default"])


def test_membership_needs_held_out_rows() -> None:
    models, splits = make("mlp")
    holdout = splits.pop("holdout")
    assert evaluate(models, splits).get("membership_auc", "forget") is None
    assert evaluate(models, splits | {"holdout": holdout}).get("membership_auc", "forget") is not None


def test_a_single_forget_row_can_be_judged() -> None:
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
    class Letters:
        """A tokenizer of letters."""

        eos_token_id, pad_token_id, chat_template = 0, 0, None

        def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
            return [1 + ord(letter) % 20 for letter in text]

    model, raw = tiny_gpt2(), [{"prompt": "who", "completion": "ann"}, {"prompt": "what", "completion": "a cat"}]
    tokens = [(Letters().encode(r["prompt"]), [*Letters().encode(r["completion"]), 0]) for r in raw]
    encoded = [{"input_ids": p + c, "labels": [-100] * len(p) + c} for p, c in tokens]
    mine = evaluate_unlearning(model, {"forget": raw}, processing_class=Letters()).metrics
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
def test_models_come_back_in_their_mode(training: bool) -> None:
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
    with pytest.raises(SettingsError, match=r"unknown metric 'rouge'; did you mean 'rouge_l'\? choose from accuracy, .*membership_auc"):
        evaluate_unlearning(tiny_mlp(), {"forget": vector_rows(2)}, metrics=["loss", "rouge"])


@pytest.mark.parametrize("split", ["forget", "holdout"])
def test_an_empty_split_is_an_error_that_names_it(split: str) -> None:
    with pytest.raises(DataError, match=f"the {split} set is empty"):
        evaluate_unlearning(tiny_mlp(), {"forget": vector_rows(2), split: []})


def test_rows_without_labels_are_an_error() -> None:
    with pytest.raises(DataError, match="no column 'labels'"):
        evaluate_unlearning(tiny_gpt2(), {"forget": text_rows(2, labels=False)})


# Report


def small_report() -> UnlearningReport:
    models, splits = make("mlp")
    report = evaluate(models, splits)
    report.request = {"rows": 5, "source": "made up"}
    report.method, report.timings = {"steps": 12, "loss": "npo"}, {"unlearn": 3.25}
    report.history = [{"step": 1, "loss": 0.5}]
    report.drift = {"relative": 0.01234, "kl": None, "by_layer": {"first": 0.01}}
    return report


def cells(table: str) -> list[list[str]]:
    header, rule, *rows = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]
    assert all(set(cell) == {"-"} for cell in rule) and all(len(row) == len(header) for row in rows)
    return [header, *rows]


def test_the_table_holds_every_number() -> None:
    report = small_report()
    header, *rows = cells(report.table())
    assert header == ["metric", "split", *MODELS, "n"]
    found = {(row[0], row[1]): dict(zip(header[2:], row[2:], strict=True)) for row in rows}
    for metric in report.metrics:
        row = found[metric.name, metric.split]
        assert row[metric.model] == f"{metric.value:.3f} [{metric.low:.3f}, {metric.high:.3f}]"
        assert row["n"] == str(metric.n)
    assert len(rows) == len({(m.name, m.split) for m in report.metrics})
    lost = replace(report, metrics=report.metrics[1:])
    gone = report.metrics[0]
    assert next(r for r in cells(lost.table()) if r[:2] == [gone.name, gone.split])[2] == "not measured"


def test_a_report_survives_its_file(tmp_path: Path) -> None:
    report = small_report()
    path = report.save(tmp_path)
    assert path == tmp_path / REPORT and [p.name for p in tmp_path.iterdir()] == [REPORT]
    assert UnlearningReport.load(tmp_path) == UnlearningReport.load(path) == report
    assert UnlearningReport.load(path) != replace(report, hardware="another")


def test_nan_and_infinities_become_null_and_read_as_undefined(tmp_path: Path) -> None:
    metrics = [
        MetricValue("forget_quality", math.nan, "forget", "unlearned", 5, math.nan, math.inf),
        MetricValue("loss", 0.5, "forget", "unlearned", 5, 0.25, math.inf),
    ]
    report = UnlearningReport(metrics=metrics, history=[{"loss": math.inf, "step": 1}], drift={"kl": -math.inf})
    content = json.loads(report.save(tmp_path).read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert content["metrics"][0]["value"] is None and content["metrics"][0]["low"] is None
    assert content["history"] == [{"loss": None, "step": 1}] and content["drift"] == {"kl": None}
    loaded = UnlearningReport.load(tmp_path)
    assert math.isnan(loaded.metrics[0].value)
    for each in (report, loaded):
        assert cells(each.table())[1] == ["forget_quality", "forget", "undefined", "5"]
    assert cells(loaded.table())[2] == ["loss", "forget", "0.500", "5"]


def test_values_of_other_types_are_saved_as_numbers_and_text(tmp_path: Path) -> None:
    report = UnlearningReport(
        settings={"lr": np.float32(0.5), "n": torch.tensor(3), "path": tmp_path, "flag": True, "betas": (0.9, 0.5)},
        entropies={"original": [np.float64(0.25)]},
    )
    report.save(tmp_path)
    loaded = UnlearningReport.load(tmp_path)
    assert loaded.settings == {"lr": 0.5, "n": 3, "path": str(tmp_path), "flag": True, "betas": [0.9, 0.5]}
    assert loaded.entropies == {"original": [0.25]} and loaded.settings["flag"] is True


def test_a_newer_format_is_an_error_and_an_unknown_field_is_not(tmp_path: Path) -> None:
    path = small_report().save(tmp_path)
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"format_version": FORMAT_VERSION + 1}))
    with pytest.raises(OutputError, match=f"newer format than {FORMAT_VERSION}: update hf-unlearn"):
        UnlearningReport.load(tmp_path)
    path.write_text(json.dumps(content | {"weather": "fair"}))
    assert UnlearningReport.load(tmp_path) == small_report()


@pytest.mark.parametrize("text", [None, "{", ""])
def test_what_is_no_report_is_an_error(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / REPORT).write_text(text)
    with pytest.raises(OutputError, match="is not an unlearning report"):
        UnlearningReport.load(tmp_path)


def test_a_metric_that_was_not_measured_is_none() -> None:
    report = small_report()
    assert report.get("rouge", "forget") is None and report.get("loss", "elsewhere") is None
    assert report.get("loss", "forget") in report.metrics


def test_side_by_side_has_a_line_for_each_report_and_for_both_other_models() -> None:
    one, two = small_report(), small_report()
    two.metrics = [replace(m, value=m.value / 2) for m in two.metrics]
    two.drift, two.method = {}, {"steps": 7}
    header, *rows = cells_of_side_by_side(side_by_side({"npo": one, "pgu": two}, "accuracy"))
    assert header == ["model", *SIZES, "membership AUC", "drift", "steps", "unlearning s"]
    assert [row[0] for row in rows] == ["original", "npo", "pgu", "retrained"]
    for row, report, kind in zip(
        rows, (one, one, two, one), ("original", "unlearned", "unlearned", "retrained"), strict=True
    ):
        expected = [report.get("accuracy", split, kind).value for split in SIZES]  # type: ignore[union-attr]
        assert row[1:4] == [f"{value:.4f}" for value in expected]
        assert row[4] == f"{report.get('membership_auc', 'forget', kind).value:.3f}"  # type: ignore[union-attr]
    assert rows[1][5:] == ["0.0123", "12", "3.2"] and rows[2][5:] == ["-", "7", "3.2"]
    assert rows[1][1:5] != rows[2][1:5]


def cells_of_side_by_side(table: str) -> list[list[str]]:
    header, _, *rows = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]
    return [header, *rows]


def test_side_by_side_without_a_retrained_model_or_attack_has_no_number_for_them() -> None:
    report = small_report()
    report.metrics = [m for m in report.metrics if m.model != "retrained" and m.name != "membership_auc"]
    _, *rows = cells_of_side_by_side(side_by_side({"npo": report}, "loss"))
    assert [row[0] for row in rows] == ["original", "npo"] and rows[0][4] == "-"


def test_image_rows_of_a_real_head_go_all_the_way() -> None:
    report = evaluate_unlearning(tiny_vit(), {"forget": image_rows(3), "holdout": image_rows(3, 1)})
    assert {m.name for m in report.metrics} == set(SUITES["default"]) and report.versions and report.hardware
