"""The variables of the card template: what a report says, as text that is safe in a Markdown table.

Requests show counts, source, date and commitment; nothing else of them reaches a card.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hf_unlearn.core.text import as_text, is_finite
from hf_unlearn.errors import SettingsError
from hf_unlearn.evaluation.report import MetricValue, UnlearningReport
from hf_unlearn.evaluation.tables import content_lines, revealed_lines
from hf_unlearn.publishing.markdown import (
    NOT_MEASURED,
    NOT_RECORDED,
    UNDEFINED,
    code,
    escape,
    percent,
    sentence,
    text,
    with_unit,
)
from hf_unlearn.publishing.plots import PICTURES

WEIGHTS_TRAINED = "not used: the weights themselves were trained"
MODELS = ("original", "unlearned", "retrained")
UNITS = {name: f"{name} (nats)" for name in ("loss", "entropy", "content_loss", "function_loss")}
AUTO_CLASSES = {
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "summarization": "AutoModelForSeq2SeqLM",
    "translation": "AutoModelForSeq2SeqLM",
    "text-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "image-classification": "AutoModelForImageClassification",
}
"""The auto class that loads a model, by the Hub's name of its task."""
REQUEST_FIELDS = ("rows", "source", "date", "number", "commitment")
METHOD_FIELDS = (
    "loss",
    "loss_settings",
    "constraint",
    "constraint_settings",
    "stopped",
    "steps",
    "retain_rows_used",
    "rows_rehearsed",
)
SUMMARY_FIELDS = ("loss_summary", "constraint_summary")
STATISTICS_FIELDS = ("rows", "weights", "data")
COVERAGE_FIELDS = ("protected", "frozen", "exposed")
ATTACKS = {
    "membership": r"^membership_auc\s",  # the attack by the loss alone; the table of metrics has the others
    "relearning": "relearn",
    "quantisation": r"quanti[sz]|(?<![a-z0-9])\d+.?bit",
}


def template_variables(report: UnlearningReport, model_name: str, plots: Sequence[str]) -> dict[str, Any]:
    """Return everything that a template may use except `card_data`."""
    method, coverage = dict(report.method), report.method.get("coverage") or {}
    method.setdefault("steps", max((line["step"] for line in report.history if "step" in line), default=None))
    models = [*MODELS, *dict.fromkeys(m.model for m in report.metrics if m.model not in MODELS)]
    exposed = coverage.get("exposed")
    return {
        "model_name": escape(model_name),
        "base_model": _base_model(method),
        "base_model_revision": text(method.get("base_model_revision")),
        "usage": _usage(method, model_name),
        "licence": text((method.get("card") or {}).get("license")),
        "request": _only({**report.request, "rows": _count(report.request.get("rows"))}, REQUEST_FIELDS),
        "cut": _cut(report),
        "method": _only(method, METHOD_FIELDS) | {name: sentence(method.get(name)) for name in SUMMARY_FIELDS},
        "statistics": _only(method.get("statistics") or {}, STATISTICS_FIELDS),
        "coverage": _only({name: _count(value) for name, value in coverage.items()}, COVERAGE_FIELDS),
        "exposed": [code(name) for name in exposed] if isinstance(exposed, Sequence) else [],
        "adapter": text(method.get("adapter"), missing=WEIGHTS_TRAINED if "adapter" in method else NOT_RECORDED),
        "retained_energy": _retained_energy(method),
        "layers": _layers(report),
        "drift": _drift(report),
        "retain_changes": _retain_changes(report),
        "outcome": _outcome(report),
        "revealed": [escape(line) for line in revealed_lines(report)],
        "content": [escape(line) for line in content_lines(report)],
        "models": [escape(model) for model in models],
        "metric_rows": _metric_rows(report, models),
        "has_retrained": any(m.model == "retrained" for m in report.metrics),
        "bootstrap_seeds": text(sorted({m.seed for m in report.metrics}) or None),
        "attacks": {name: _attack(report.metrics, pattern) for name, pattern in ATTACKS.items()},
        "series": _series(report),
        "verdicts": _pairs(report.audit.get("verdicts") or {}),
        "not_run": _pairs(report.audit.get("not_run") or {}),
        "undefined": _undefined(report.metrics),
        "settings": _pairs({name: value for name, value in report.settings.items() if not name.endswith("token")}),
        "seed": text(report.settings.get("seed")),
        "versions": _pairs(report.versions),
        "hardware": text(report.hardware or None),
        "timings": [(code(name), f"{seconds:.1f} s") for name, seconds in report.timings.items() if is_finite(seconds)],
        "plots": [_picture(name) for name in plots],
        "sample_header": _sample_header(report.samples),
        "sample_rows": [[text(row.get(key)) for key in _sample_keys(report.samples)] for row in report.samples],
    }


def names_base_model(method: Mapping[str, Any]) -> bool:
    """Whether the base model can be linked on the Hub; the name of a local folder looks like an id too."""
    return is_hub_id(method.get("base_model")) and not method.get("base_model_is_local")


def is_hub_id(name: Any) -> bool:
    """Whether `name` looks like `owner/model` or `model` on the Hub and not like a local path."""
    part = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
    return isinstance(name, str) and bool(re.fullmatch(f"{part}(/{part})?", name)) and not Path(name).exists()


# Small helpers


def _only(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Format these names and no others, so that nothing private reaches a public card; missing ones say so."""
    return {name: text(values.get(name)) for name in names}


def _count(value: Any) -> Any:
    """Replace a list by its length: its items may be private."""
    return len(value) if isinstance(value, (list, tuple)) else value


def _pairs(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(code(name), text(value, missing="none")) for name, value in values.items()]


def _cut(report: UnlearningReport) -> str:
    """Return how many rows of which sets were cut at `max_length`, and by how many tokens."""
    if not report.data:
        return NOT_RECORDED
    parts = [
        f"{escape(name)}: {count['rows_cut']} of {count['rows']} rows ({count['tokens_cut']} tokens)"
        for name, count in report.data.items()
        if count["rows_cut"]
    ]
    return "; ".join(parts) or "none"


# The method


def _base_model(method: Mapping[str, Any]) -> str:
    name = method.get("base_model")
    if isinstance(name, str) and names_base_model(method):
        return f"[{escape(name)}](https://huggingface.co/{quote(name)})"
    return f"a local model, {code(Path(str(name)).name)}" if name else NOT_RECORDED


def _usage(method: Mapping[str, Any], model_name: str) -> str:
    """Return the Python code that loads the model."""
    auto = AUTO_CLASSES.get(str(method.get("task")), "AutoModel")
    adapter = method.get("adapter")
    name = re.sub(r"[^\w./-]", "_", model_name)
    processor = "AutoImageProcessor" if method.get("task") == "image-classification" else "AutoTokenizer"
    if adapter and not adapter.get("merged"):
        peft = f"AutoPeft{auto.removeprefix('Auto')}" if auto.endswith("LM") else "AutoPeftModel"
        first = f"from peft import {peft} as {auto}\nfrom transformers import {processor}"
    else:
        first = f"from transformers import {auto}, {processor}"
    lines = [
        first,
        "",
        f'name = "{name}"  # the Hub id of this model, or its folder',
        f"model = {auto}.from_pretrained(name)",
        f"processor = {processor}.from_pretrained(name)",
    ]
    return "\n".join(lines)


def _retained_energy(method: Mapping[str, Any]) -> str:
    """Return the energy setting, and the share of the energy and of the dimensions that it protected in this run.

    Read off the run, so that it holds for any constraint: `retained` is None if the constraint protects no directions
    entirely (`Constraint.protected_rank`).
    """
    settings, retained = method.get("constraint_settings"), method.get("retained")
    if not isinstance(settings, Mapping):
        return NOT_RECORDED
    if retained is None and ("energy" not in settings or "retained" in method):
        return "no cut by energy with this constraint"
    setting = _energy_setting(settings)
    if not isinstance(retained, Mapping):
        return f"{setting}; as share of the energy: {NOT_RECORDED}"
    if not retained.get("rank"):
        instead = f"; used instead: {sentence(retained['instead'])}" if retained.get("instead") else ""
        return f"{setting}, but nothing is cut: the inputs have no leading directions{instead}"
    shares = (
        f"{percent(retained.get('energy'))} of the energy of the inputs, in {percent(retained.get('rank'))} of their "
        f"dimensions (means over {text(retained.get('layers'))} layers){_missed_energy(method)}"
    )
    return f"{setting}: {shares}" if "energy" in settings else shares


def _energy_setting(settings: Mapping[str, Any]) -> str:
    if "energy" not in settings:
        return "a share of the spectrum"
    spectrum = f" ({text(settings['spectrum']).replace('_', ' ')})" if settings.get("spectrum") else ""
    return f"{text(settings['energy'])} of the spectrum{spectrum}"


def _missed_energy(method: Mapping[str, Any]) -> str:
    sketched = method.get("sketched")
    if not isinstance(sketched, Mapping):
        return ""
    grams, missed = text(sketched.get("grams")), percent(sketched.get("missed"))
    return f"; {grams} Gram matrices are known from sketches, which miss at most {missed} of the energy"


def _layers(report: UnlearningReport) -> str:
    """Return the layers by the pattern of their names, such as `model.layers.*.mlp.up_proj` x 30."""
    patterns = Counter(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", str(name)) for name in report.drift.get("by_layer") or ())
    shown = ", ".join(f"{code(name)} x {n}" if n > 1 else code(name) for name, n in patterns.items())
    return f"{patterns.total()}: {shown}" if shown else NOT_RECORDED


# Outcome, drift and metrics


def _outcome(report: UnlearningReport) -> dict[str, str]:
    """Return the outcome of the run in one line, and what to try next."""
    return {name: sentence(report.outcome.get(name)) for name in ("summary", "advice")}


def _drift(report: UnlearningReport) -> dict[str, str]:
    """Return the predicted drift: relative output change, KL in nats, and the layers in which it is largest."""
    layers = {name: value for name, value in (report.drift.get("by_layer") or {}).items() if is_finite(value)}
    largest = sorted(layers, key=lambda name: layers[name], reverse=True)[:3]
    # without statistics the drift is an empty sum, and zero would be a claim
    measured = report.drift if layers or report.drift.get("relative") else {}
    return {
        "relative": with_unit(measured.get("relative")),
        "kl": with_unit(measured.get("kl"), unit=" nats per label"),
        "layers": str(len(layers)) if layers else NOT_RECORDED,
        "largest": ", ".join(f"{code(name)} {layers[name]:.3g}" for name in largest) or NOT_MEASURED,
    }


def _retain_changes(report: UnlearningReport) -> list[str]:
    changes = []
    for name in dict.fromkeys(m.name for m in report.metrics):
        before, after = (report.get(name, "retain", model) for model in ("original", "unlearned"))
        if before and after and is_finite(before.value) and is_finite(after.value):
            change = after.value - before.value
            changes.append(
                f"{escape(UNITS.get(name, name))} {as_text(before.value)} → {as_text(after.value)} ({change:+.3f})"
            )
    return changes


def _metric_rows(report: UnlearningReport, models: Sequence[str]) -> list[list[str]]:
    """Return rows of metric, split, a cell per model, and the number of rows that were measured."""
    rows = []
    for name, split in dict.fromkeys((m.name, m.split) for m in report.metrics):
        metrics = [m for m in report.metrics if (m.name, m.split) == (name, split)]
        cells = ["; ".join(_value(m) for m in metrics if m.model == model) or NOT_MEASURED for model in models]
        counts = " / ".join(str(n) for n in dict.fromkeys(m.n for m in metrics))
        rows.append([escape(UNITS.get(name, name)), escape(split), *cells, counts])
    return rows


def _attack(metrics: Iterable[MetricValue], pattern: str) -> str:
    """Return the results of an attack by metric and split, each with the models in their usual order."""
    results = [m for m in metrics if re.search(pattern, f"{m.name} {m.split} {m.model}", re.IGNORECASE)]
    lines = []
    for name, split in dict.fromkeys((m.name, m.split) for m in results):
        by_model = [m for m in results if (m.name, m.split) == (name, split)]
        by_model.sort(key=lambda m: MODELS.index(m.model) if m.model in MODELS else len(MODELS))
        values = ", ".join(f"{escape(m.model)} {_value(m)}" for m in by_model)
        counts = " / ".join(str(n) for n in dict.fromkeys(m.n for m in by_model))
        lines.append(f"{escape(name)} on {escape(split)}: {values} (n = {counts})")
    return "; ".join(lines) or NOT_MEASURED


def _value(metric: MetricValue) -> str:
    if not is_finite(metric.value):
        return UNDEFINED
    has_interval = is_finite(metric.low) and is_finite(metric.high)
    if metric.low is None or metric.high is None or not has_interval:
        return as_text(metric.value)
    return f"{as_text(metric.value)} [{as_text(metric.low)}, {as_text(metric.high)}]"


def _undefined(metrics: Iterable[MetricValue]) -> list[str]:
    """Return why numbers are undefined, each reason once."""
    reasons = (f"{code(m.name)} on {escape(m.split)}: {escape(m.reason)}" for m in metrics if m.reason)
    return list(dict.fromkeys(reasons))


def _series(report: UnlearningReport) -> list[tuple[str, str]]:
    """Return the table rows of a request in a series: the room left, the drift of all requests, and warnings."""
    series = report.series
    if not series:
        return []
    room, used = series.get("room") or {}, series.get("drift_used") or {}
    budget = "none" if used.get("budget") is None else text(used["budget"])
    rows = [
        ("share of the forget rows' input energy that the constraint left free", percent(room.get("mean"))),
        ("predicted drift of all requests, relative", f"{text(used.get('relative'))} (budget: {budget})"),
    ]
    return rows + [("warning", escape(line)) for line in series.get("warnings") or ()]


# Pictures and samples


def _picture(name: str) -> tuple[str, str]:
    """Return the description and the address of a picture in the card's folder."""
    if Path(name).is_absolute() or ".." in Path(name).parts or ":" in name:
        raise SettingsError(f"plot {name!r} must be a path relative to the card, such as 'plots/metrics.png'")
    file = Path(name).name
    description = PICTURES[file][1] if file in PICTURES else escape(Path(name).stem.replace("_", " "))
    return description, quote(Path(name).as_posix())


def _sample_keys(samples: Sequence[Mapping[str, str]]) -> list[str]:
    return list(dict.fromkeys(key for row in samples for key in row))


def _sample_header(samples: Sequence[Mapping[str, str]]) -> list[str]:
    titles = {"answer": "Before", "original": "Before", "unlearned": "After"}
    return [escape(titles.get(key, key.capitalize())) for key in _sample_keys(samples)]
