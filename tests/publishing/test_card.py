"""Laws of the card: it shows every metric, nothing is blank or NaN, tables keep their shape, unknown variables raise.

A Markdown parser (markdown-it) reads the tables, and not the code under test. Each law has a negative control.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from helpers.paths import ROOT
from hf_unlearn.errors import SettingsError
from hf_unlearn.evaluation.report import MetricValue, UnlearningReport
from hf_unlearn.publishing.card import default_template, render_card, write_card
from hf_unlearn.publishing.card_sections import is_hub_id
from hf_unlearn.publishing.markdown import code, escape, sentence, text

REVISION = "3f49326eb077187dfe1c2a2bb15fbd74e6ab91e3"
METADATA = "---\n{{ card_data }}\n---\n"


def make_report() -> UnlearningReport:
    values = {"original": 0.981, "unlearned": 0.0612, "retrained": 0.0601}
    metrics = [
        MetricValue(name, value + 0.0011 * i, split, model, 20 + i, value - 0.05, value + 0.05, seed=3)
        for name in ("accuracy", "loss", "membership_auc")
        for i, split in enumerate(("forget", "retain", "holdout"))
        for model, value in values.items()
    ]
    return UnlearningReport(
        metrics=metrics,
        request={"rows": 20, "source": "locuslab/TOFU, one author", "date": "2025-05-01", "commitment": "ab12"},
        method={
            "loss": "npo",
            "loss_settings": {"beta": 0.1},
            "constraint": "energy",
            "constraint_settings": {"energy": 0.9, "spectrum": "singular_values"},
            "statistics": {"rows": 80, "weights": "11" * 32, "data": "22" * 32},
            "coverage": {"protected": 210, "frozen": 62, "exposed": ["lm_head.weight"]},
            "base_model": "google/vit-base-patch16-224",
            "base_model_revision": REVISION,
            "stopped": "forget probability reached held-out",
            "retain_rows_used": 0,
            "task": "text-generation",
        },
        settings={"learning_rate": 1e-3, "seed": 7, "optim": "sgd", "max_length": None},
        versions={"torch": "2.7.0"},
        hardware="2 cores",
        timings={"unlearn": 26.04},
        history=[{"loss": 1.0, "step": 4, "epoch": 1.0}],
        drift={"relative": 0.0061, "kl": None, "by_layer": {"model.layers.0.q_proj": 0.007}},
    )


def body(card: str) -> str:
    return card.split("\n---\n", 1)[1]


def tables(card: str) -> list[list[list[str]]]:
    """Return the rows of each table as lists of raw cell text, as a Markdown parser sees them."""
    parsed: list[list[list[str]]] = []
    tokens = MarkdownIt("commonmark").enable("table").parse(body(card))
    for i, token in enumerate(tokens):
        if token.type == "table_open":
            parsed.append([])
        elif token.type == "tr_open":
            parsed[-1].append([])
        elif token.type in ("th_open", "td_open"):
            parsed[-1][-1].append(tokens[i + 1].content)
    return parsed


def cells(card: str) -> dict[str, str]:
    """Return the second cell by the first, from the tables with two columns."""
    return {row[0]: row[1] for table in tables(card) for row in table if len(row) == 2}


def metric_table(card: str) -> list[list[str]]:
    return next(table for table in tables(card) if table[0][0] == "metric")


def test_every_metric_is_in_the_table_and_in_the_model_index() -> None:
    report = make_report()
    report.metrics.append(MetricValue("relearned_probability", 0.4321, "forget", "unlearned after 8 steps", 15))
    card = render_card(report, model_name="me/model")
    table = metric_table(card)
    index = {(r.dataset_split, r.metric_name): r.metric_value for r in ModelCard(card).data.eval_results or []}
    own = [metric for metric in report.metrics if metric.model == "unlearned"]
    assert 0 < len(index) == len(own) < len(report.metrics)  # the numbers of other models are not this model's results
    for metric in report.metrics:
        (row,) = [row for row in table if row[0].split(" (")[0] == metric.name and row[1] == metric.split]
        assert f"{metric.value:.3f}" in row[table[0].index(metric.model)]
        assert str(metric.n) in row[-1]
        if metric in own:
            assert index[metric.split, f"{metric.name} ({metric.model})"] == metric.value
    fewer = metric_table(render_card(replace(report, metrics=report.metrics[1:]), model_name="m"))
    assert table[1][2] == "0.981 [0.931, 1.031]" and fewer[1][2] == "not measured"


def test_the_card_shows_verdicts_attacks_that_were_not_run_and_why_a_number_is_undefined() -> None:
    report = make_report()
    before = render_card(report, model_name="m")
    attacks = ("membership_auc_zlib", "membership_auc_min_k")
    report.metrics += [MetricValue(name, 0.7, "forget", "unlearned", 20) for name in attacks]
    report.metrics.append(
        MetricValue("forget_quality", math.nan, "forget", "unlearned", 20, reason="no retrained model | given")
    )
    verdict = "remembers more than the retrained model"
    report.audit = {"verdicts": {"relearning_steps": verdict}, "not_run": {"recalibration": "it has no batch norm"}}
    card = render_card(report, model_name="m")
    said = cells(card)
    assert said["`relearning_steps`"] == verdict and said["`recalibration`"] == "it has no batch norm"
    assert "`forget_quality` on forget: no retrained model \\| given" in card
    assert not {"`relearning_steps`", "`recalibration`"} & set(cells(before)) and "Undefined:" not in before
    (name,) = [name for name in said if name.startswith("membership inference")]
    assert said[name] == cells(before)[name] and not any(attack in said[name] for attack in attacks)  # stays short


def test_a_request_of_a_series_shows_its_number_the_room_left_and_warnings() -> None:
    report = make_report()
    assert cells(render_card(report, model_name="m"))["number in its ledger"] == "not recorded"
    report.request["number"] = 3
    report.series = {
        "room": {"mean": 0.25},
        "drift_used": {"relative": 0.0123, "budget": None},
        "warnings": ["the room | runs out"],
    }
    said = cells(render_card(report, model_name="m"))
    assert said["number in its ledger"] == "3" and said["warning"] == "the room | runs out"
    assert said["predicted drift of all requests, relative"] == "0.0123 (budget: none)" and "25.0%" in said.values()


def test_the_card_shows_everything_that_was_recorded() -> None:
    card = render_card(make_report(), model_name="me/model", plots=["plots/metrics.png", "plots/my own.png"])
    for part in (
        "locuslab/TOFU, one author",
        "2025-05-01",
        "ab12",
        REVISION,
        "npo",
        "beta = 0.1",
        "`lm_head.weight`",
        "0.9 of the spectrum (singular values)",
        "forget probability reached held-out",
        "11" * 32,
        "2.7.0",
        "2 cores",
        "26.0 s",
        "0.0061",
        "arXiv:2312.04095",
        "unlearning_report.json",
        "](plots/metrics.png)",
        "![my own](plots/my%20own.png)",
        "0.982 → 0.062 (-0.920)",
    ):
        assert part in card, part
        assert part not in render_card(UnlearningReport(), model_name="m") or part in default_template().read_text()
    assert cells(card)["seed"] == "7" and cells(card)["steps"] == "4"
    assert "No retrained model" not in card


def test_metadata_parses_and_names_the_base_model() -> None:
    data = ModelCard(render_card(make_report(), model_name="me/model")).data.to_dict()
    assert data["tags"] == ["machine-unlearning", "hf_unlearn", "npo", "energy"]
    assert data["base_model"] == "google/vit-base-patch16-224" and data["base_model_relation"] == "finetune"
    assert data["pipeline_tag"] == "text-generation" and data["library_name"] == "transformers"
    assert data["model-index"][0]["name"] == "me/model"
    empty = ModelCard(render_card(UnlearningReport(), model_name="me/model")).data.to_dict()
    assert not {"model-index", "base_model", "base_model_relation", "pipeline_tag"} & empty.keys()


def test_the_card_distinguishes_adapters_merged_adapters_and_full_weights() -> None:
    report = make_report()
    report.method["adapter"] = None
    full = render_card(report, model_name="m")
    assert cells(full)["adapter"] == "not used: the weights themselves were trained"
    report.method["adapter"] = {"type": "LORA", "r": 16, "target_modules": ["q_proj", "v_proj"], "merged": False}
    card = render_card(report, model_name="m")
    data = ModelCard(card).data.to_dict()
    assert (data["base_model_relation"], data["library_name"]) == ("adapter", "peft")
    assert cells(card)["adapter"] == "type = LORA, r = 16, target_modules = q_proj, v_proj, merged = False"
    report.method["adapter"]["merged"] = True
    data = ModelCard(render_card(report, model_name="m")).data.to_dict()
    assert (data["base_model_relation"], data["library_name"]) == ("finetune", "transformers")
    report.method.pop("adapter")
    assert cells(render_card(report, model_name="m"))["adapter"] == "not recorded"


def test_layers_are_named_by_pattern_and_retained_energy_as_measured() -> None:
    report = make_report()
    report.drift["by_layer"] = {f"model.layers.{i}.mlp.{name}": 0.1 for i in range(12) for name in ("up", "down")}
    report.drift["by_layer"]["score"] = 0.1
    shown = cells(render_card(report, model_name="m"))
    assert shown["layers trained"] == "25: `model.layers.*.mlp.up` x 12, `model.layers.*.mlp.down` x 12, `score`"
    energy = "retained energy: what steps may not change"
    assert shown[energy] == "0.9 of the spectrum (singular values); as share of the energy: not recorded"
    report.method["retained"] = {"energy": 0.9931, "rank": 0.25, "layers": 25}
    expected = "0.9 of the spectrum (singular values): 99.3% of the energy of the inputs, in 25.0% of their dimensions"
    assert cells(render_card(report, model_name="m"))[energy].startswith(expected)
    report.method["retained"]["energy"] = math.nan
    assert "undefined of the energy" in cells(render_card(report, model_name="m"))[energy]


def test_numpy_scalars_become_numbers() -> None:
    report = make_report()
    report.metrics = [replace(report.metrics[0], value=np.float32(0.5), low=np.float32(0.25), high=np.float32(0.75))]
    report.settings["learning_rate"] = np.float64(0.125)
    card = render_card(report, model_name="m")
    assert "0.500 [0.250, 0.750]" in card and cells(card)["`learning_rate`"] == "0.125"
    assert "numpy" not in card and "np." not in card


@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_undefined_values_read_undefined_and_stay_out_of_the_metadata(value: float | None) -> None:
    report = make_report()
    report.metrics[0] = replace(report.metrics[0], value=value, low=value, high=value)  # type: ignore[arg-type]
    own = [metric for metric in report.metrics if metric.model == "unlearned"]
    report.metrics = [replace(m, value=value) if m is own[0] else m for m in report.metrics]  # type: ignore[arg-type]
    report.drift = {"relative": value, "kl": value, "by_layer": {"a": value, "b": 0.5}}
    report.settings["learning_rate"] = value
    report.timings["unlearn"] = value  # type: ignore[assignment]
    card = render_card(report, model_name="m")
    assert metric_table(card)[1][2] == "undefined"
    assert not re.search(r"\b(nan|inf|none)\b", card.replace("| none |", ""), re.IGNORECASE)
    assert len(ModelCard(card).data.eval_results or []) == len(own) - 1
    assert re.search(r"\bnan\b", str(math.nan))  # negative control: the search finds a NaN


def test_nothing_is_blank_and_missing_values_say_so() -> None:
    card = render_card(UnlearningReport(), model_name="m")
    headers = [["", ""]]
    for table in tables(card):
        for row in table[1:] if table[:1] == headers else table:
            assert all(cell.strip() for cell in row), row
    shown = cells(card)
    for name in ("relearning from a few of the forgotten rows", "quantisation of the weights"):
        assert shown[name] == "not measured"
    assert shown["predicted, relative (root mean square over layers)"] == "not measured"
    assert shown["revision of the base model"] == shown["hardware"] == "not recorded"
    assert "**No retrained model was available**" in card and "Metrics: not measured" in card
    full = cells(render_card(make_report(), model_name="m"))
    assert "not recorded" not in (full["hardware"], full["source"], full["date"])


def test_a_model_that_was_not_measured_reads_not_measured() -> None:
    report = make_report()
    report.metrics = [m for m in report.metrics if m.model != "retrained"]
    card = render_card(report, model_name="m")
    table = metric_table(card)
    column = table[0].index("retrained")
    assert {row[column] for row in table[1:]} == {"not measured"}
    assert "No retrained model was available" in card


def test_relearning_and_quantisation_are_shown_once_measured() -> None:
    report = make_report()
    report.metrics += [
        MetricValue("relearned_probability", 0.4, "forget", "unlearned", 15),
        MetricValue("answer_probability", 0.06, "forget", "unlearned, 4-bit", 20),
    ]
    shown = cells(render_card(report, model_name="m"))
    assert "0.400" in shown["relearning from a few of the forgotten rows"]
    assert "0.060" in shown["quantisation of the weights"]


@pytest.mark.parametrize("nasty", ["a|b", r"a\|b", "a\nb", "`a|", "<b>|", "|", r"\\|", "*[a](b)|"])
def test_a_bar_in_a_name_does_not_break_a_table(nasty: str) -> None:
    shape = [[len(row) for row in table] for table in tables(render_card(make_report(), model_name="m"))]
    report = make_report()
    report.metrics = [replace(m, split=nasty if m.split == "forget" else m.split) for m in report.metrics]
    report.request["source"] = report.method["stopped"] = report.hardware = report.versions["torch"] = nasty
    report.method["coverage"]["exposed"] = [nasty]
    report.drift["by_layer"] = {nasty: 0.1}
    report.settings = {nasty if name == "optim" else name: value for name, value in report.settings.items()}
    parsed = tables(render_card(report, model_name=nasty))
    assert [[len(row) for row in table] for table in parsed] == shape


def test_the_table_reader_sees_a_bar_that_is_not_escaped() -> None:
    header = "x\n---\n| a | b |\n|---|---|\n"
    assert tables(f"{header}| {escape('1|2')} | {code('1|2')} |")[0][1] == [r"1|2", "`1|2`"]
    assert tables(f"{header}| 1|2 | 3 |")[0][1] == ["1", "2"]


def test_the_request_shows_counts_and_no_rows() -> None:
    report = make_report()
    report.request |= {"rows": ["id-71", "id-72"], "texts": ["a secret"], "ids": ["id-71"]}
    report.settings |= {"hub_token": "hf_secret", "output_dir": "/home/someone/out"}
    card = render_card(report, model_name="m")
    assert cells(card)["rows to forget"] == "2" and "`seed`" in card
    assert not re.search("id-7|secret|someone", card)


def test_samples_are_shown_only_when_present() -> None:
    report = make_report()
    assert "before and after" not in render_card(report, model_name="m")
    report.samples = [{"prompt": "Who | wrote\nit?", "answer": "<b>Hina</b>", "after": "unsure"}]
    card = render_card(report, model_name="m")
    table = next(table for table in tables(card) if table[0] == ["Prompt", "Before", "After"])
    assert table[1] == ["Who | wrote it?", "&lt;b&gt;Hina&lt;/b&gt;", "unsure"]


def test_a_custom_template_gets_the_same_variables(tmp_path: Path) -> None:
    own = tmp_path / "own.md"
    own.write_text(METADATA + "{{ request.rows }} rows of {{ model_name }}")
    assert render_card(make_report(), model_name="m", template=own).endswith("\n20 rows of m")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (METADATA + "{{ who_knows }}", "who_knows"),
        (METADATA + "{% if false %}{{ who_knows }}{% endif %}", "who_knows"),
        (METADATA + "{{ request.texts }}", "texts"),
        (METADATA + "{% if %}", "line 4"),
        (METADATA + "{{ card_data.__class__.__mro__ }}", "unsafe"),
        ("no metadata", "metadata block"),
        ("---\na: [\n---\n", "cannot be read"),
    ],
)
def test_an_error_in_a_template_is_named(tmp_path: Path, source: str, message: str) -> None:
    own = tmp_path / "own.md"
    own.write_text(source)
    with pytest.raises(SettingsError, match=message):
        render_card(make_report(), model_name="m", template=own)


def test_a_missing_template_and_a_plot_outside_the_folder_raise(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"none\.md"):
        render_card(make_report(), model_name="m", template=tmp_path / "none.md")
    for name in ("/tmp/a.png", "../a.png", "https://x.org/a.png"):
        with pytest.raises(SettingsError, match="relative"):
            render_card(make_report(), model_name="m", plots=[name])


def test_write_card_writes_the_readme_and_nothing_else(tmp_path: Path) -> None:
    report = make_report()
    path = write_card(report, tmp_path / "new", model_name="m", plots=["plots/metrics.png"])
    assert path.read_text(encoding="utf-8") == render_card(report, model_name="m", plots=["plots/metrics.png"])
    assert [file.name for file in path.parent.iterdir()] == ["README.md"]


def test_a_report_read_back_gives_the_same_card(tmp_path: Path) -> None:
    report = make_report()
    report.save(tmp_path)
    again = render_card(UnlearningReport.load(tmp_path), model_name="m")
    assert sorted(again.splitlines()) == sorted(render_card(report, model_name="m").splitlines())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", True),
        ("me/a-b.c_d", True),
        ("/home/me/model", False),
        ("./model", False),
        ("a/b/c", False),
        ("", False),
        (None, False),
        ("a b", False),
        ("../x", False),
        ("tests", False),
    ],
)
def test_hub_ids_and_paths_are_distinguished(name: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert is_hub_id(name) is expected


def test_a_local_base_model_is_named_without_its_path() -> None:
    report = make_report()
    report.method["base_model"] = "/home/someone/my-model"
    card = render_card(report, model_name="m")
    assert "`my-model`" in card and "someone" not in card and "base_model" not in ModelCard(card).data.to_dict()
    # a folder's name alone looks like an id; only the run knows that it is a folder
    report.method["base_model"] = "my-model"
    assert ModelCard(render_card(report, model_name="m")).data.to_dict()["base_model"] == "my-model"
    report.method["base_model_is_local"] = True
    card = render_card(report, model_name="m")
    assert "`my-model`" in card and "base_model" not in ModelCard(card).data.to_dict()


def test_values_are_formatted_as_text() -> None:
    assert text(None) == text("") == "not recorded"
    assert text(2e-05) == "2e-05" and text(0) == "0" and text(True) == "True"
    assert text({"a": None, "b": [1, 2.5]}) == "a = none, b = 1, 2.5" and text([]) == "none"


def test_the_default_template_exists() -> None:
    assert default_template().read_text(encoding="utf-8").startswith(METADATA)


def test_code_spans_of_a_docstring_stay_code_and_everything_else_is_escaped() -> None:
    assert sentence("Steps of `D (I - U U^T)`, a * b | c.") == r"Steps of `D (I - U U^T)`, a \* b \| c."
    assert sentence("an odd ` backtick") == escape("an odd ` backtick")
    assert sentence(None) == "not recorded"


def test_the_words_on_loss_and_constraint_come_from_the_report() -> None:
    report = make_report()
    names = ("what the constraint allows", "what the loss computes")
    assert [cells(render_card(report, model_name="m"))[name] for name in names] == ["not recorded"] * 2
    report.method |= {"constraint_summary": "Steps of `D / 2`.", "loss_summary": "The `nll`."}
    assert [cells(render_card(report, model_name="m"))[name] for name in names] == ["Steps of `D / 2`.", "The `nll`."]


def test_the_metadata_has_licence_language_and_data_sets_where_they_are_known() -> None:
    report = make_report()
    known = ModelCard(render_card(report, model_name="m")).data.to_dict()
    assert not {"license", "language", "datasets"} & known.keys()
    facts = {"license": "apache-2.0", "language": ["en"], "datasets": ["locuslab/TOFU"]}
    report.method["card"] = facts
    card = render_card(report, model_name="m")
    assert facts.items() <= ModelCard(card).data.to_dict().items() and "| licence | apache-2.0 |" in card


@pytest.mark.parametrize(
    ("task", "adapter", "seen"),
    [
        ("text-generation", None, "from transformers import AutoModelForCausalLM, AutoTokenizer"),
        ("text-generation", {"merged": True}, "from transformers import AutoModelForCausalLM, AutoTokenizer"),
        ("text-generation", {"merged": False}, "from peft import AutoPeftModelForCausalLM as AutoModelForCausalLM"),
        ("image-classification", None, "from transformers import AutoModelForImageClassification, AutoImageProcessor"),
        (None, None, "from transformers import AutoModel, AutoTokenizer"),
    ],
)
def test_the_card_has_code_that_loads_the_model(task: str | None, adapter: dict | None, seen: str) -> None:
    report = make_report()
    report.method |= {"task": task, "adapter": adapter}
    code = body(render_card(report, model_name="tiny")).split("```python\n", 1)[1].split("```", 1)[0]
    assert seen in code and 'name = "tiny"' in code
    compile(code, "card", "exec")


def test_an_empty_source_is_not_recorded() -> None:
    report = make_report()
    report.request["source"] = "  "
    assert "(source: not recorded)" in render_card(report, model_name="m")
