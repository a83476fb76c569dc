"""Laws of the audit: each attack does what it says to the weights or the rows, everything is put back to the bit, the
verdict follows from the two models' numbers, and what could not be run is said with its reason."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from helpers.questions import letters, questions
from helpers.texts import tokenizer
from helpers.tiny import CASES, CLASSES, image_rows, text_rows, tiny_gpt2, tiny_llama, tiny_mlp, tiny_vit, vector_rows
from hf_unlearn.data.batches import PaddingCollator
from hf_unlearn.data.encoding import encode_dataset
from hf_unlearn.errors import DataError, SettingsError
from hf_unlearn.evaluation.attacks.auditing import ALIKE, ATTACKS, AuditSettings, Shadow, audit, verdict
from hf_unlearn.evaluation.attacks.inputs import few_shot_prompts, hidden_means, linear_probe, paraphrased_prompts
from hf_unlearn.evaluation.attacks.subject import NotRun, Subject
from hf_unlearn.evaluation.attacks.weights import (
    quantisation,
    quantise,
    recalibrate,
    recalibration,
    relearning,
    relearning_on_other_data,
    rounded,
    train,
)
from hf_unlearn.evaluation.measurements import MeasurementTools
from hf_unlearn.evaluation.report import MetricValue, UnlearningReport
from hf_unlearn.evaluation.row_scores import score_rows
from hf_unlearn.models.layers import find_layers
from hf_unlearn.models.modes import restored

TEXTS = {"forget": text_rows(8), "retain": text_rows(9, 1), "holdout": text_rows(8, 2)}


class Normed(nn.Module):
    """A classifier with batch norm: `pixel_values [B, 6] -> logits [B, CLASSES]`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.norm(self.first(pixel_values))))


def subject(model: nn.Module, rows: Any = TEXTS, original: Any = None, **settings: Any) -> Subject:
    return Subject(model, rows, MeasurementTools(PaddingCollator(), None, 3), AuditSettings(**settings), original)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


# Putting back


def test_a_model_is_restored_even_after_an_error() -> None:
    model = Normed().train()
    model.first.weight.requires_grad_(False)
    model.second.weight.grad = torch.ones_like(model.second.weight)
    before, random = state(model), torch.get_rng_state()
    with pytest.raises(KeyError), restored(model):
        model(torch.randn(4, 6)).sum().backward()
        torch.optim.SGD([model.second.weight], 1.0).step()
        model.eval().norm.requires_grad_(False)
        assert not same(before, state(model))
        raise KeyError
    assert same(before, state(model)) and torch.equal(torch.get_rng_state(), random)
    assert all(module.training for module in model.modules())
    assert not model.first.weight.requires_grad and model.norm.weight.requires_grad
    assert torch.equal(model.second.weight.grad, torch.ones_like(model.second.weight))


@pytest.mark.parametrize("case", ["llama", "gpt2", "vit", "mlp"])
def test_an_audit_restores_both_models(case: str) -> None:
    make, rows = CASES[case]
    splits = {name: rows(8, seed) for seed, name in enumerate(("forget", "retain", "holdout"))}
    model, retrained = make(0).train(), make(1)
    before = [state(model), state(retrained)]
    report = audit(model, splits, original=make(2), retrained=retrained, settings=AuditSettings(relearn_steps=2))
    assert same(before[0], state(model)) and same(before[1], state(retrained)) and model.training
    assert all(p.grad is None for p in model.parameters())
    assert {m.model for m in report.metrics} == {"unlearned", "retrained"} and report.audit["verdicts"]


# Weights


def test_relearning_is_adamw_on_the_mean_loss_of_the_rows() -> None:
    model, twin = tiny_llama(), tiny_llama()
    made = subject(model, relearn_steps=3, relearn_learning_rate=1e-3)
    assert list(train(made, TEXTS["forget"][:5])) == [0, 1, 2]  # in parts of three rows
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-3, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        losses = []
        for row in TEXTS["forget"][:5]:
            tokens, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
            log_p = twin(tokens[None]).logits[0, :-1].log_softmax(-1)
            kept = labels[1:] != -100
            losses.append(-log_p[kept].gather(1, labels[1:][kept][:, None]).mean())
        torch.stack(losses).mean().backward()
        optimizer.step()
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5)


def memorised(rows: list, steps: int = 60) -> nn.Module:
    """A model that has learnt `rows` by heart."""
    model = tiny_llama(3)
    list(train(subject(model, relearn_steps=steps, relearn_learning_rate=3e-3), rows))
    return model


def test_rows_that_are_only_hidden_are_relearned_in_fewer_steps_than_unknown_rows() -> None:
    """The hidden model knows the rows but for a scaled-down output; the other never saw them."""
    answer = [7, 8, 9]
    alike = [
        {"input_ids": row["input_ids"][:2] + answer, "attention_mask": [1] * 5, "labels": [-100, -100, *answer]}
        for row in text_rows(8)
    ]
    original = memorised(alike)
    hidden = deepcopy(original)
    with torch.no_grad():
        hidden.lm_head.weight.mul_(0.4)
    settings: dict[str, Any] = {"relearn_steps": 30, "relearn_learning_rate": 5e-3, "margin": 0.3}
    before = subject(original, {"forget": alike}).score(alike)
    steps = {}
    for name, model in (("hidden", hidden), ("never", tiny_llama(4))):
        result = list(relearning(subject(model, {"forget": alike}, before, **settings)))
        assert [o.name for o in result] == ["relearned_probability", "relearned_steps"] and result[0].estimate.n == 4
        steps[name] = np.nan_to_num(result[1].estimate.value, nan=np.inf)
    assert steps["hidden"] < steps["never"] and steps["hidden"] > 0


def test_relearning_scores_only_rows_it_was_not_trained_on_and_needs_two() -> None:
    with pytest.raises(NotRun, match="at least two forget rows"):
        list(relearning(subject(tiny_llama(), {"forget": TEXTS["forget"][:1]})))
    result = list(relearning(subject(tiny_llama(), {"forget": TEXTS["forget"][:3]})))
    assert result[0].estimate.n == 2
    assert math.isnan(result[1].estimate.value) and "no original model" in result[1].estimate.reason  # type: ignore
    with pytest.raises(NotRun, match="a split holdout or test or retain"):
        list(relearning_on_other_data(subject(tiny_llama(), {"forget": TEXTS["forget"]})))


@pytest.mark.parametrize("shape", [(3, 5), (2, 64), (4, 130)])
@pytest.mark.parametrize("bits", [8, 4])
def test_rounding_equals_its_twin(shape: tuple[int, int], bits: int) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = rounded(weight, bits).double().numpy()
    for row, values in zip(result, weight.double().numpy(), strict=True):
        block = len(values) if bits == 8 else 64
        for start in range(0, len(values), block):
            part = values[start : start + block]
            scale = max(abs(part)) / (2 ** (bits - 1) - 1)
            np.testing.assert_allclose(row[start : start + block], [round(v / scale) * scale for v in part], atol=1e-6)
            assert len(set(np.round(row[start : start + block] / scale))) <= 2**bits - 1
    assert (rounded(weight, 4) - weight).norm() > 4 * (rounded(weight, 8) - weight).norm() > 0
    assert rounded(torch.zeros(shape), bits).abs().sum() == 0


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_quantisation_rounds_the_linear_layers_and_nothing_else(make: Any) -> None:
    model = make()
    before = state(model)
    quantise(model, 4)
    layers = {f"{name}.weight" for name in find_layers(model)}
    changed = {name for name, tensor in state(model).items() if not torch.equal(tensor, before[name])}
    assert changed == layers and "lm_head.weight" in before
    name, module = next(iter(find_layers(model).items()))
    old = before[f"{name}.weight"]
    transposed = make is tiny_gpt2
    expected = rounded(old.T if transposed else old, 4)
    torch.testing.assert_close(module.weight.T if transposed else module.weight, expected)


def test_quantisation_reports_both_widths_for_forget_and_retain_rows() -> None:
    model = tiny_llama()
    result = {(o.name, o.split): o.estimate.value for o in quantisation(subject(model))}
    assert set(result) == {(f"quantised_{b}_bit_probability", s) for b in (8, 4) for s in ("forget", "retain")}
    quantise(model, 4)
    assert result["quantised_4_bit_probability", "forget"] == pytest.approx(
        subject(model).score(TEXTS["forget"]).mean()
    )
    assert result["quantised_4_bit_probability", "forget"] != result["quantised_8_bit_probability", "forget"]


def test_recalibration_takes_the_statistics_of_the_rows() -> None:
    model = Normed().eval()
    with torch.no_grad():
        model.norm.running_mean.fill_(5.0)
    rows = {"forget": vector_rows(5), "retain": vector_rows(9, 1)}
    made = Subject(model, rows, MeasurementTools(PaddingCollator(), None, 3), AuditSettings())
    stale = made.score(rows["forget"]).mean()
    (result,) = recalibration(made)
    assert model.norm.running_mean[0] == 5 and result.name == "recalibrated_accuracy" and result.estimate.n == 5
    recalibrate(made, [model.norm], rows["retain"])
    with torch.no_grad():
        inputs = model.first(torch.stack([row["pixel_values"] for row in rows["retain"]]))
    torch.testing.assert_close(model.norm.running_mean, inputs.mean(0))
    assert result.estimate.value == made.score(rows["forget"]).mean() and model.norm.momentum == 0.1
    assert stale is not None and not model.norm.training
    with pytest.raises(NotRun, match="no batch norm"):
        list(recalibration(subject(tiny_llama())))


# Inputs


def test_few_shot_prompts_put_other_rows_before_the_row() -> None:
    model = tiny_llama()
    (result,) = few_shot_prompts(subject(model, shots=2))
    shown = [token for row in TEXTS["retain"][:2] for token in row["input_ids"]]
    rows = [{"input_ids": shown + r["input_ids"], "labels": [-100] * len(shown) + r["labels"]} for r in TEXTS["forget"]]
    assert result.estimate.value == pytest.approx(score_rows(model, rows, PaddingCollator()).probability.mean())
    assert result.estimate.value != pytest.approx(subject(model).score(TEXTS["forget"]).mean(), rel=1e-3)
    with pytest.raises(NotRun, match=r"a row has \d+ tokens, the context is 64"):
        list(few_shot_prompts(subject(model, shots=9)))
    with pytest.raises(NotRun, match="rows of a classifier have no prompt"):
        list(few_shot_prompts(subject(tiny_mlp(), {"forget": vector_rows(2)})))


def test_few_shot_prompts_are_the_tokens_of_the_joined_text() -> None:
    model, words = tiny_llama(), tokenizer(template=None, bos=True)
    texts = {"forget": ["in Ulm .", "in Rome"], "retain": ["where", "Bonn ?", "live"]}
    rows = {split: encode_dataset([{"text": text} for text in given], words) for split, given in texts.items()}
    tools = MeasurementTools(PaddingCollator(), words, 3)
    (result,) = few_shot_prompts(Subject(model, rows, tools, AuditSettings(shots=2)))
    joined = [{"prompt": "where\n\nBonn ?\n\n", "completion": text} for text in texts["forget"]]
    expected = score_rows(model, encode_dataset(joined, words), PaddingCollator()).probability.mean()
    assert result.estimate.value == pytest.approx(expected)
    apart = few_shot_prompts(Subject(model, rows, MeasurementTools(PaddingCollator()), AuditSettings(shots=2)))
    assert next(apart).estimate.value != pytest.approx(expected, rel=1e-3)
    unreadable = [row | {"input_ids": [100, *row["input_ids"][1:]]} for row in rows["forget"]]
    with pytest.raises(NotRun, match="other tokens of a row's text than the row has"):
        list(few_shot_prompts(Subject(model, rows | {"forget": unreadable}, tools, AuditSettings())))


def test_paraphrased_prompts_ask_for_the_same_answer_with_another_question() -> None:
    raw = [row | {"paraphrased_question": "other"} for row in questions(4)]
    model, rows = tiny_llama(), encode_dataset(raw, letters())
    (result,) = paraphrased_prompts(subject(model, {"forget": rows}))
    twins = [{"prompt": "other", "completion": row["completion"]} for row in raw]
    expected = score_rows(model, encode_dataset(twins, letters()), PaddingCollator()).probability.mean()
    assert result.estimate.value == pytest.approx(expected)
    with pytest.raises(NotRun, match="paraphrased_question"):
        list(paraphrased_prompts(subject(model)))


def test_hidden_means_are_those_of_each_row_alone() -> None:
    model = tiny_llama()
    result = hidden_means(subject(model), TEXTS["forget"])
    with torch.no_grad():
        for row, means in zip(TEXTS["forget"], result, strict=True):
            states = model(torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states
            np.testing.assert_allclose(means, [s[0].mean(0).numpy() for s in states], rtol=1e-4, atol=1e-4)


def test_the_probe_tells_marked_rows_apart_and_similar_rows_not() -> None:
    marked = [row | {"input_ids": [5, 5, 5, *row["input_ids"][3:]]} for row in text_rows(20, 7)]
    model = tiny_llama()
    result = {}
    for name, forget in (("marked", marked), ("alike", text_rows(20, 8))):
        (outcome,) = linear_probe(subject(model, {"forget": forget, "holdout": text_rows(20, 9)}))
        result[name] = outcome.estimate
    assert result["marked"].value > 0.95 and result["marked"].value > result["alike"].value and result["alike"].n == 40
    with pytest.raises(NotRun, match="4 forget and 4 held-out rows"):
        list(linear_probe(subject(model, {"forget": marked[:1], "holdout": marked})))
    with pytest.raises(NotRun, match="does not give"):
        list(linear_probe(subject(tiny_mlp(), {"forget": vector_rows(4), "holdout": vector_rows(4)})))


# Verdicts


@pytest.mark.parametrize(
    ("mine", "other", "memory", "words"),
    [
        ((0.9, 0.8, 1.0), (0.2, 0.1, 0.3), "more", "remembers more than the retrained model"),
        ((0.2, 0.1, 0.3), (0.9, 0.8, 1.0), "more", "remembers less than it"),
        ((2, None, None), (6, None, None), "less", "remembers more than the retrained model"),
        ((0.5, 0.3, 0.7), (0.6, 0.4, 0.8), "more", ALIKE),
        ((0.2, 0.1, 0.3), (0.5, 0.4, 0.6), "either", "stands out from the retrained model, below it"),
        ((0.9, 0.8, 1.0), (0.5, 0.4, 0.6), "either", "stands out from the retrained model, above it"),
        ((math.nan, None, None), (0.5, 0.4, 0.6), "more", "unknown: because"),
        ((0.9, 0.8, 1.0), None, "more", "unknown: no retrained model to compare with"),
    ],
)
def test_the_verdict_follows_from_the_intervals(mine: Any, other: Any, memory: str, words: str) -> None:
    def metric(numbers: Any, model: str) -> MetricValue:
        value, low, high = numbers
        reason = "because" if math.isnan(value) else ""
        return MetricValue("probe_auc", value, "forget", model, 9, low, high, reason=reason)

    assert verdict(metric(mine, "unlearned"), other and metric(other, "retrained"), memory) == words


def test_an_original_model_that_poses_as_unlearned_is_detected_and_the_retrained_one_is_not() -> None:
    known, unknown = text_rows(10), text_rows(10, 2)
    original = memorised(known, 80)
    splits = {"forget": known, "holdout": unknown, "retain": text_rows(6, 5)}
    settings = AuditSettings(relearn_steps=2)
    attacks = ["membership", "quantisation", "relearning"]
    caught = audit(original, splits, original=original, retrained=tiny_llama(3), attacks=attacks, settings=settings)
    clean = audit(tiny_llama(3), splits, original=original, retrained=tiny_llama(3), attacks=attacks, settings=settings)
    for name in ("quantised_8_bit_probability", "relearned_probability"):
        assert caught.audit["verdicts"][name] == "remembers more than the retrained model"
        assert clean.audit["verdicts"][name] == ALIKE
    assert caught.audit["verdicts"]["membership_auc"] == "stands out from the retrained model, above it"
    assert clean.audit["verdicts"]["membership_auc"] == ALIKE
    assert caught.audit["verdicts"]["membership_auc_reference"] == "can be told from held-out rows"
    steps = caught.get("relearned_steps", "forget")
    assert steps is not None and steps.value == 0


def test_the_report_gives_the_reason_for_each_attack_that_did_not_run() -> None:
    report = audit(tiny_mlp(), {"forget": vector_rows(1)})
    assert set(report.audit["not_run"]) >= {"relearning", "recalibration", "linear_probe", "few_shot_prompts"}
    assert report.audit["not_run"]["membership_auc"] == "it needs a split test or holdout"
    assert all(reason for reason in report.audit["not_run"].values())
    assert {m.name for m in report.metrics} == {"quantised_8_bit_accuracy", "quantised_4_bit_accuracy"}
    assert set(report.audit["verdicts"].values()) == {"unknown: no retrained model to compare with"}
    images = {name: image_rows(6, i) for i, name in enumerate(("forget", "retain", "holdout"))}
    result = audit(tiny_vit(), images, attacks=["membership"])
    assert result.audit["not_run"]["membership_auc_min_k"] == "it is an attack on texts"
    assert {m.name for m in result.metrics} == {"membership_auc", "membership_auc_gradient_norm", "membership_efficacy"}


def test_shadow_models_show_which_rows_a_classifier_was_trained_on() -> None:
    """The shadow, and the model under attack, are sure of the rows they were trained on; the other model of none."""

    def trained(rows: list) -> nn.Module:
        model = tiny_mlp(3, width=64)
        list(train(subject(model, {"forget": rows}, relearn_steps=150, relearn_learning_rate=0.02), rows))
        return model

    members, others, known = (vector_rows(60, seed) for seed in (5, 6, 7))
    shadows = [Shadow(trained(members), members, others)]
    shares = {}
    for name, model in (("trained", trained(known)), ("never", trained(others))):
        report = audit(model, {"forget": known}, attacks=["shadow_models"], shadows=shadows)
        shares[name] = report.get("membership_shadow_models", "forget")
    assert shares["trained"].value + 0.3 < shares["never"].value and shares["never"].n == 60
    text = audit(tiny_llama(), TEXTS, attacks=["shadow_models"], shadows=shadows)
    assert text.audit["not_run"] == {"shadow_models": "it is an attack on classifiers"}


def test_a_report_with_an_audit_survives_its_file(tmp_path: Any) -> None:
    report = audit(tiny_mlp(), {"forget": vector_rows(3), "holdout": vector_rows(3, 1)}, retrained=tiny_mlp(1))
    report.save(tmp_path)
    assert UnlearningReport.load(tmp_path).audit == report.audit and report.audit["verdicts"]


def test_wrong_arguments_are_errors() -> None:
    with pytest.raises(SettingsError, match=f"unknown attack 'magic'; choose from {', '.join(ATTACKS)}"):
        audit(tiny_mlp(), {"forget": vector_rows(2)}, attacks=["magic"])
    with pytest.raises(DataError, match="one must be named 'forget'"):
        audit(tiny_mlp(), {"holdout": vector_rows(2)})
    with pytest.raises(DataError, match="the forget set is empty"):
        audit(tiny_mlp(), {"forget": []})
