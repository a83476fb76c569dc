"""Laws of measures and judges: a suite's numbers are those of the metrics on scores computed apart; what was measured
once for the same weights and rows is not measured again; what is missing is an error that names it."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers import reference_metrics as reference
from helpers.questions import letters, questions, tofu_splits
from helpers.tiny import (
    CASES,
    image_rows,
    requires_asset,
    text_rows,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_mlp,
    tiny_vit,
)
from hf_unlearn.data.batches import PaddingCollator
from hf_unlearn.data.encoding import encode_dataset
from hf_unlearn.data.wrong_answers import ALTERNATIVES
from hf_unlearn.errors import DataError, ModelError, SettingsError
from hf_unlearn.evaluation import measurements as measures
from hf_unlearn.evaluation.evaluate import evaluate_unlearning, random_twin
from hf_unlearn.evaluation.generation import generate_answers, true_answers
from hf_unlearn.evaluation.measurements import MeasurementTools, measure, wrong_losses
from hf_unlearn.evaluation.metrics.registry import METRICS, SUITES
from hf_unlearn.evaluation.row_scores import score_rows
from hf_unlearn.models.fingerprint import model_fingerprint

TOOLS = MeasurementTools(PaddingCollator(), None, 3)


def cached(folder: Path) -> MeasurementTools:
    return MeasurementTools(PaddingCollator(), None, 3, folder)


# Other answers


def test_other_answers_are_encoded_next_to_the_answer_and_do_not_reach_the_model() -> None:
    raw = questions(2)
    rows = encode_dataset(raw, letters())
    plain = encode_dataset([{k: r[k] for k in ("prompt", "completion")} for r in raw], letters())
    assert [{k: v for k, v in row.items() if k != ALTERNATIVES} for row in rows] == plain
    for row, given in zip(rows, raw, strict=True):
        others = row[ALTERNATIVES]
        assert [o["input_ids"] for o in others["wrong"]] == [
            [*letters().encode(given["prompt"] + wrong), 0] for wrong in given["perturbed_answer"]
        ]
        assert others["paraphrase"]["labels"] == [-100] * 3 + letters().encode(given["paraphrased_answer"]) + [0]
    assert set(PaddingCollator()(rows)) == {"input_ids", "attention_mask", "labels"}


@pytest.mark.parametrize("wrong", [[], None, "one"])
def test_a_row_whose_wrong_answers_are_missing_is_an_error_that_names_it(wrong: Any) -> None:
    raw = questions(3)
    raw[1] = raw[1] | {"perturbed_answer": wrong}
    with pytest.raises(DataError, match="row 1 of the forget set needs a list of wrong answers in 'perturbed_answer'"):
        encode_dataset(raw, letters(), what="forget")


def test_losses_of_other_answers_are_those_of_the_rows_alone() -> None:
    model, raw = tiny_llama(), questions(4)
    rows = encode_dataset(raw, letters())
    result = measure(["alternatives"], model, rows, TOOLS)
    for row, losses, paraphrase in zip(raw, wrong_losses(result), result["paraphrase_loss"], strict=True):
        own = [{"prompt": row["prompt"], "completion": answer} for answer in row["perturbed_answer"]]
        np.testing.assert_allclose(losses, alone(model, own), rtol=1e-4)
        other = [{"prompt": row["prompt"], "completion": row["paraphrased_answer"]}]
        np.testing.assert_allclose([paraphrase], alone(model, other), rtol=1e-4)
    without = encode_dataset(questions(4, paraphrase=False), letters())
    plain = [{k: v for k, v in row.items() if k != ALTERNATIVES} for row in without]
    own = score_rows(model, plain, PaddingCollator())
    np.testing.assert_allclose(measure(["alternatives"], model, without, TOOLS)["paraphrase_loss"], own.loss, rtol=1e-4)


def alone(model: Any, raw: list[dict[str, Any]]) -> np.ndarray:
    return score_rows(model, encode_dataset(raw, letters()), PaddingCollator(), batch_size=1).loss


# Generated answers


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_answers_are_the_most_probable_tokens_one_after_the_other_whatever_the_batch(make: Any) -> None:
    model, rows = make(), text_rows(5, prompt=3)
    rows[1] = rows[1] | {"labels": [-100, *rows[1]["input_ids"][1:]]}  # prompts of several lengths
    result = generate_answers(model, rows, letters(), 6, batch_size=5)
    twins = []
    for row in rows:
        tokens = row["input_ids"][: row["labels"].count(-100)]
        new: list[int] = []
        while len(new) < 6 and 0 not in new:
            with torch.no_grad():
                new.append(int(model(torch.tensor([tokens + new])).logits[0, -1].argmax()))
        twins += letters().batch_decode([new])
    assert result == [text.strip() for text in twins] == generate_answers(model, rows, letters(), 6, batch_size=1)
    assert len(set(result)) > 1


def test_generation_settings_of_the_model_change_nothing() -> None:
    model, rows = tiny_llama(), text_rows(4)
    plain = generate_answers(model, rows, letters(), 6)
    model.generation_config.update(do_sample=True, temperature=5.0, repetition_penalty=3.0, num_beams=2)
    assert generate_answers(model, rows, letters(), 6) == plain
    assert model.generation_config.do_sample


def test_an_answer_ends_with_the_context_and_a_prompt_that_fills_it_is_an_error() -> None:
    rows = text_rows(2, lengths=(31,), prompt=30)
    assert len(generate_answers(tiny_gpt2(), rows, letters(), 200)) == 2  # 32 learnt positions
    with pytest.raises(DataError, match="a prompt of 32 tokens fills the context of 32"):
        generate_answers(tiny_gpt2(), text_rows(2, lengths=(33,), prompt=32), letters(), 5)


@pytest.mark.parametrize(
    ("model", "rows", "tokenizer", "error", "message"),
    [
        (tiny_llama(), text_rows(2, prompt=0), letters(), DataError, "no prompt to generate from"),
        (tiny_llama(), text_rows(2), None, SettingsError, "pass it as processing_class"),
        (tiny_bert(), text_rows(2), letters(), ModelError, "BertForSequenceClassification generates no text"),
        (tiny_llama(), text_rows(2, labels=False), letters(), DataError, "no sequence of labels"),
    ],
)
def test_rows_and_models_that_allow_no_generation_are_errors(
    model: Any, rows: Any, tokenizer: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        generate_answers(model, rows, tokenizer, 4)


def test_true_answers_are_the_labels_as_text() -> None:
    rows = encode_dataset([{"prompt": "who", "completion": "ann bell"}], letters())
    assert true_answers(rows, letters()) == ["ann bell"] and true_answers(rows, letters(), 3) == ["ann"]


# Suites


def test_the_tofu_suite_equals_metrics_made_of_scores_computed_apart() -> None:
    models = {kind: tiny_llama(seed) for seed, kind in enumerate(("original", "unlearned", "retrained"))}
    raw = tofu_splits()
    report = evaluate_unlearning(
        models["unlearned"],
        raw,
        original=models["original"],
        retrained=models["retrained"],
        metrics=["tofu"],
        processing_class=letters(),
        batch_size=4,
    )
    assert {m.name for m in report.metrics} == {*SUITES["tofu"], *SUITES["content"]}

    def ratios(kind: str) -> list[float]:
        result = []
        for row in raw["forget"]:
            answers = [row["paraphrased_answer"], *row["perturbed_answer"]]
            losses = alone(models[kind], [{"prompt": row["prompt"], "completion": answer} for answer in answers])
            result.append(reference.truth_ratio(losses[0], losses[1:]))
        return result

    def value(name: str, split: str = "forget", kind: str = "unlearned") -> float:
        metric = report.get(name, split, kind)
        assert metric is not None
        return metric.value

    mine, others = ratios("unlearned"), ratios("retrained")
    assert value("truth_ratio") == pytest.approx(np.mean([min(r, 1 / r) for r in mine]), rel=1e-3)
    assert value("forget_quality") == pytest.approx(reference.ks_pvalue(mine, others))
    assert report.get("forget_quality", "forget", "retrained") is None
    parts = []
    for split in ("retain", "real_authors_perturbed", "world_facts"):
        name = "answer_probability" if split == "retain" else "multiple_choice_probability"
        parts += [value(name, split), value("rouge_l", split), value("truth_ratio", split)]
    assert value("model_utility", "retain") == pytest.approx(reference.harmonic(parts))
    scores = {
        (kind, split): score_rows(models[kind], encode_dataset(raw[split], letters()), PaddingCollator())
        for kind in models
        for split in ("forget", "holdout")
    }
    for name, column in (("membership_auc", "loss"), ("membership_auc_min_k", "min_k")):
        pair = [-getattr(scores["unlearned", split], column) for split in ("forget", "holdout")]
        assert value(name) == pytest.approx(reference.auc(*pair))
    four = [-scores[kind, split].min_k for kind in ("unlearned", "retrained") for split in ("forget", "holdout")]
    assert value("priv_leak") == pytest.approx(reference.priv_leak(*four))
    relative = [-(scores["unlearned", s].loss - scores["retrained", s].loss) for s in ("forget", "holdout")]
    assert value("membership_auc_reference") == pytest.approx(reference.auc(*relative))
    assert 0 <= value("aggregate") <= 1


def test_the_muse_suite_cuts_answers_where_muse_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A continuation is compared with as many true tokens as are generated, an answer up to the next question."""
    true = {"forget_verbmem": "w" * 200, "forget_knowmem": "a b c d", "retain_knowmem": "a b"}
    splits = {name: encode_dataset([{"prompt": "who", "completion": text}], letters()) for name, text in true.items()}
    splits |= {"forget": text_rows(6), "holdout": text_rows(6, 1)}
    said = {128: "w" * 128, 32: "a b\nQuestion c d"}
    asked: list[int] = []

    def answers(model: Any, rows: Any, tokenizer: Any, new_tokens: int, batch_size: int) -> list[str]:
        asked.append(new_tokens)
        return [said[new_tokens]] * len(rows)

    monkeypatch.setattr(measures, "generate_answers", answers)
    report = evaluate_unlearning(
        tiny_llama(), splits, retrained=tiny_llama(1), metrics=["muse"], processing_class=letters()
    )
    assert {m.name for m in report.metrics} == set(SUITES["muse"]) and sorted(set(asked)) == [32, 128]
    result = {m.name: m.value for m in report.metrics if m.model == "unlearned"}
    assert result["verbatim_memorisation"] == 1 and result["knowledge_utility"] == 1
    assert result["knowledge_memorisation"] == pytest.approx(2 * 0.5 / 1.5)  # precision 1, recall 2 of 4


def test_the_classification_suite_compares_with_the_retrained_model() -> None:
    splits = {"forget": image_rows(6), "retain": image_rows(8, 1), "test": image_rows(7, 2)}
    report = evaluate_unlearning(tiny_vit(0), splits, retrained=tiny_vit(1), metrics=["classification"])
    assert {m.name for m in report.metrics} == set(SUITES["classification"])
    scores = [[score_rows(tiny_vit(i), rows, PaddingCollator()).accuracy for rows in splits.values()] for i in (0, 1)]
    gaps = [abs(a.mean() - b.mean()) for a, b in zip(*scores, strict=True)]
    tug = report.get("tug_of_war", "forget")
    assert tug is not None and tug.value == pytest.approx(math.prod(1 - gap for gap in gaps)) and tug.n == 21
    same = evaluate_unlearning(tiny_vit(0), splits, retrained=tiny_vit(0), metrics=["classification"])
    for name, expected in (("average_gap", 0), ("tug_of_war", 1), ("activation_distance", 0), ("js_divergence", 0)):
        metric = same.get(name, "forget")
        assert metric is not None and metric.value == pytest.approx(expected, abs=1e-9)
        assert report.get(name, "forget") != metric


def test_metrics_against_the_retrained_model_are_undefined_without_one_and_give_the_reason() -> None:
    report = evaluate_unlearning(tiny_llama(), tofu_splits(), metrics=["tofu"], processing_class=letters())
    comparing = {name for name in SUITES["tofu"] if METRICS[name].against_retrained}
    undefined = {m.name for m in report.metrics if math.isnan(m.value)}
    assert comparing == undefined == {"forget_quality", "priv_leak", "aggregate", "membership_auc_reference"}
    for metric in report.metrics:
        assert bool(re.search("none was given|no retrained", metric.reason)) == (metric.name in undefined)
    assert "forget_quality on forget is undefined: no retrained model was given" in report.table()


def test_missing_wrong_answers_or_splits_are_errors_before_anything_is_measured() -> None:
    plain = {"forget": text_rows(3), "holdout": text_rows(3, 1)}
    for name, message in (
        ("truth_ratio", "'truth_ratio' needs wrong answers, and the split forget, holdout has none.*perturbed_answer"),
        ("forget_quality", "'forget_quality' needs wrong answers, and the split forget has none"),
        ("average_gap", "'average_gap' needs a split retain; the splits are forget, holdout"),
        ("model_utility", "needs a split retain_perturbed or retain, real_authors_perturbed or real_authors"),
    ):
        with pytest.raises(DataError, match=message):
            evaluate_unlearning(None, plain, metrics=[name])  # type: ignore[arg-type]
    with pytest.raises(DataError, match="this is for classifiers"):
        evaluate_unlearning(tiny_llama(), plain, retrained=tiny_llama(1), metrics=["js_divergence"])


def test_nan_logits_are_undefined_in_every_metric_they_reach() -> None:
    model = tiny_mlp()
    rows = CASES["mlp"][1](6)
    with torch.no_grad():
        model.second.bias.fill_(math.nan)
    report = evaluate_unlearning(model, {"forget": rows[:3], "holdout": rows[3:]})
    assert report.metrics and all(math.isnan(m.value) and m.low is None for m in report.metrics)


def test_a_random_twin_is_fresh_and_repeats_by_seed() -> None:
    for make in (tiny_vit, tiny_mlp):
        model = make(5)
        state = torch.get_rng_state()
        twins = [random_twin(model, seed) for seed in (0, 0, 1)]
        assert torch.equal(torch.get_rng_state(), state)
        weights = [torch.cat([p.flatten() for p in m.parameters()]) for m in (model, *twins)]
        assert torch.equal(weights[1], weights[2]) and not torch.equal(weights[1], weights[3])
        assert not torch.equal(weights[0], weights[1]) and weights[1].std() > 0


# Cache


def test_cached_columns_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, splits = tiny_llama(), {"forget": text_rows(4), "holdout": text_rows(5, 1)}
    first = evaluate_unlearning(model, splits, original=tiny_llama(1), cache_dir=tmp_path)
    files = sorted(p.name for p in tmp_path.iterdir())
    assert len(files) == 8 and all(name.endswith(".safetensors") for name in files)
    monkeypatch.setattr(measures, "score_rows", lambda *a: pytest.fail("measured again"))
    again = evaluate_unlearning(tiny_llama(), splits, original=tiny_llama(1), cache_dir=tmp_path)
    assert again.metrics == first.metrics and sorted(p.name for p in tmp_path.iterdir()) == files
    with pytest.raises(pytest.fail.Exception):
        evaluate_unlearning(tiny_llama(2), splits, cache_dir=tmp_path)


def test_other_weights_rows_labels_or_precision_are_other_entries(tmp_path: Path) -> None:
    rows = text_rows(3)
    relabelled = [rows[0] | {"labels": [-100] * 4 + rows[0]["labels"][4:]}, *rows[1:]]
    cases = [(tiny_llama(), rows), (tiny_llama(1), rows), (tiny_llama(), rows[::-1]), (tiny_llama(), relabelled)]
    cases.append((tiny_llama().bfloat16(), rows))
    for count, (model, data) in enumerate(cases, 1):
        measure(["rows"], model, data, cached(tmp_path), model_fingerprint(model))
        assert len(list(tmp_path.iterdir())) == count
    measure(["rows"], tiny_llama(), text_rows(3), cached(tmp_path), model_fingerprint(tiny_llama()))
    assert len(list(tmp_path.iterdir())) == len(cases)


def test_a_trained_adapter_is_another_model_and_other_wrong_answers_are_other_rows(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    plain = tiny_llama()
    model = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"], r=2))
    before = model_fingerprint(model)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(1.0)
    assert len({model_fingerprint(plain), before, model_fingerprint(model)}) == 3
    raw = questions(2)
    other = [raw[0] | {"perturbed_answer": ["other"]}, raw[1]]
    for count, data in enumerate((raw, other), 1):
        measure(["alternatives"], plain, encode_dataset(data, letters()), cached(tmp_path), "key")
        assert len(list(tmp_path.iterdir())) == count


# Real data


def test_tofus_perturbed_splits_give_every_metric_of_its_suite() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, stories = requires_asset("tofu"), requires_asset("stories260K")

    def load(name: str, n: int) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (folder / f"{name}.json").read_text().splitlines()[:n]]

    tokenizer = AutoTokenizer.from_pretrained(stories)
    names = {
        "forget": "forget01_perturbed",
        "retain": "retain_perturbed",
        "real_authors": "real_authors_perturbed",
        "world_facts": "world_facts_perturbed",
        "holdout": "holdout10",
    }
    splits = {
        split: encode_dataset(load(name, 4), tokenizer, what=split, max_length=200) for split, name in names.items()
    }
    assert len(splits["forget"][0][ALTERNATIVES]["wrong"]) == 5 and "paraphrase" in splits["forget"][0][ALTERNATIVES]
    assert len(splits["real_authors"][0][ALTERNATIVES]["wrong"]) == 3
    models = [AutoModelForCausalLM.from_pretrained(stories) for _ in range(2)]
    report = evaluate_unlearning(
        models[0],
        splits,
        retrained=models[1],
        metrics=["forget_quality", "truth_ratio", "membership_auc_zlib"],
        processing_class=tokenizer,
        batch_size=8,
    )
    quality = report.get("forget_quality", "forget")
    assert quality is not None and quality.value == 1 and quality.n == 4  # it is the same model
    assert {m.split for m in report.metrics if m.name == "truth_ratio"} == set(splits) - {"holdout"}
