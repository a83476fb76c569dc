"""`UnlearningReport` -> model card: the README.md of an unlearned model, with metadata that the Hub reads.

The card says only what the report says. What the report lacks reads "not measured" or "not recorded", what has no
finite value "undefined"; nothing is left blank. It names no row: of the request it shows counts, source, date and
commitment, whatever else the report holds.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, meta
from jinja2.sandbox import SandboxedEnvironment

from hf_unlearn.core.files import replace_file
from hf_unlearn.core.text import is_finite
from hf_unlearn.errors import SettingsError
from hf_unlearn.evaluation.report import MetricValue, UnlearningReport
from hf_unlearn.publishing.markdown import NOT_MEASURED, NOT_RECORDED, UNDEFINED, code, escape, text, with_unit
from hf_unlearn.publishing.plots import PICTURES

TEMPLATE = "model_card_template.md"
WEIGHTS_TRAINED = "not used: the weights themselves were trained"
MODELS = ("original", "unlearned", "retrained")
UNITS = {"loss": "loss (nats)", "entropy": "entropy (nats)"}
REQUEST_FIELDS = ("rows", "source", "date", "number", "commitment")
METHOD_FIELDS = ("loss", "loss_settings", "constraint", "constraint_settings", "stopped", "steps", "retain_rows_used")
STATISTICS_FIELDS = ("rows", "weights", "data")
COVERAGE_FIELDS = ("protected", "frozen", "exposed")
ATTACKS = {
    "membership": r"^membership_auc\s",  # the attack by the loss alone; the metrics have the others
    "relearning": "relearn",
    "quantisation": r"quanti[sz]|(?<![a-z0-9])\d+.?bit",
}


def write_card(
    report: UnlearningReport,
    folder: str | os.PathLike,
    *,
    model_name: str,
    template: str | os.PathLike | None = None,
    plots: Sequence[str] = (),
) -> Path:
    """Write README.md into `folder`, whole or not at all, and return its path; see `render_card`."""
    target = Path(folder) / "README.md"
    content = render_card(report, model_name=model_name, template=template, plots=plots)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(target) as beside:
        beside.write_text(content, encoding="utf-8")
    return target


def render_card(
    report: UnlearningReport,
    *,
    model_name: str,
    template: str | os.PathLike | None = None,
    plots: Sequence[str] = (),
) -> str:
    """The card's text, metadata block first; its metadata were read back by huggingface_hub.

    Args:
        report: All that the card says.
        model_name: Title, and name of the model in the `model-index`.
        template: Your own Jinja template instead of the package's; it gets the same variables, safe for Markdown.
        plots: Pictures to embed, as paths relative to the card.

    Raises:
        SettingsError: The template cannot be read or parsed, uses a variable that a card has not, or lacks the
            metadata block; a plot is not a relative path.
    """
    path = Path(template) if template is not None else default_template()
    content = _render(path, _variables(report, model_name, plots))
    try:
        metadata = ModelCard(content).data.to_dict()
    except Exception as error:  # yaml's errors and huggingface_hub's own share no base class
        raise SettingsError(f"{path} gives a card whose metadata cannot be read: {error}") from error
    if "machine-unlearning" not in metadata.get("tags", []):
        raise SettingsError(
            f"{path} has no metadata block; begin it with the lines `---`, `{{{{ card_data }}}}`, `---`"
        )
    return content


def check_template(template: str | os.PathLike) -> None:
    """Raise `SettingsError` unless a card can be rendered from a template."""
    render_card(UnlearningReport(), model_name="model", template=template)


def default_template() -> Path:
    """The package's template: beside the modules in a wheel, in the repository's root otherwise."""
    here = Path(__file__).resolve().parent
    for folder in (here, here.parents[1]):
        if (folder / TEMPLATE).is_file():
            return folder / TEMPLATE
    raise SettingsError(f"{TEMPLATE} is neither in {here} nor in {here.parents[1]}; pass your own as `template`")


# Metadata


def card_data(report: UnlearningReport, model_name: str) -> ModelCardData:
    """What the Hub indexes: tags, base model, task, and every finite metric, told apart by the model's name in it."""
    method, task = report.method, report.method.get("task")
    names = [str(method[key]) for key in ("loss", "constraint") if method.get(key) not in (None, "", "none")]
    adapter = _has_adapter(method)
    relation = "adapter" if adapter else "finetune"
    derived = {"base_model": method["base_model"], "base_model_relation": relation} if _names_base(method) else {}
    results = [_eval_result(m, str(task or "other")) for m in report.metrics if is_finite(m.value)]
    return ModelCardData(
        model_name=model_name if results else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=str(task) if task else None,
        tags=["machine-unlearning", "hf_unlearn", *names],
        eval_results=results or None,
        **derived,
    )


def is_hub_id(name: Any) -> bool:
    """Whether `name` looks like `owner/model` or `model` on the Hub rather than like a local path."""
    part = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
    return isinstance(name, str) and bool(re.fullmatch(f"{part}(/{part})?", name)) and not Path(name).exists()


def _names_base(method: Mapping[str, Any]) -> bool:
    """Whether the base model can be linked: a folder's name alone looks like an id too."""
    return is_hub_id(method.get("base_model")) and not method.get("base_model_is_local")


def _has_adapter(method: Mapping[str, Any]) -> bool:
    """Whether what is published is an adapter, and not merged."""
    return bool(method.get("adapter")) and not method["adapter"].get("merged")


def _eval_result(metric: MetricValue, task: str) -> EvalResult:
    return EvalResult(
        task_type=task,
        dataset_type="custom",
        dataset_name=f"{metric.split} set",
        dataset_split=metric.split,
        metric_type=metric.name,
        metric_name=f"{metric.name} ({metric.model})",
        metric_value=float(metric.value),
    )


# Variables of the template


def _variables(report: UnlearningReport, model_name: str, plots: Sequence[str]) -> dict[str, Any]:
    """Everything a template may use, as text that is safe in a Markdown table unless it says otherwise."""
    method, coverage = dict(report.method), report.method.get("coverage") or {}
    method.setdefault("steps", max((line["step"] for line in report.history if "step" in line), default=None))
    models = [*MODELS, *dict.fromkeys(m.model for m in report.metrics if m.model not in MODELS)]
    exposed = coverage.get("exposed")
    return {
        "card_data": card_data(report, model_name).to_yaml(),
        "model_name": escape(model_name),
        "base_model": _base_model(method),
        "base_model_revision": text(method.get("base_model_revision")),
        "request": _filled({**report.request, "rows": _count(report.request.get("rows"))}, REQUEST_FIELDS),
        "method": _filled(method, METHOD_FIELDS),
        "statistics": _filled(method.get("statistics") or {}, STATISTICS_FIELDS),
        "coverage": _filled({name: _count(value) for name, value in coverage.items()}, COVERAGE_FIELDS),
        "exposed": [code(name) for name in exposed] if isinstance(exposed, Sequence) else [],
        "adapter": text(method.get("adapter"), missing=WEIGHTS_TRAINED if "adapter" in method else NOT_RECORDED),
        "retained_energy": _retained_energy(method),
        "layers": _layers(report),
        "drift": _drift(report),
        "retain_changes": _retain_changes(report),
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


def _filled(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, str]:
    """Only these names, so that nothing slips into a public card, and each with a text."""
    return {name: text(values.get(name)) for name in names}


def _count(value: Any) -> Any:
    """A list by its length alone: the items may be what must not be published."""
    return len(value) if isinstance(value, (list, tuple)) else value


def _pairs(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(code(name), text(value, missing="none")) for name, value in values.items()]


def _base_model(method: Mapping[str, Any]) -> str:
    name = method.get("base_model")
    if isinstance(name, str) and _names_base(method):
        return f"[{escape(name)}](https://huggingface.co/{quote(name)})"
    return f"a local model, {code(Path(str(name)).name)}" if name else NOT_RECORDED


def _retained_energy(method: Mapping[str, Any]) -> str:
    """The setting, and what it came to on these statistics."""
    settings, retained = method.get("constraint_settings"), method.get("retained")
    if not isinstance(settings, Mapping):
        return NOT_RECORDED
    if "energy" not in settings:
        return "no cut by energy with this constraint"
    asked = f"{text(settings['energy'])} of the spectrum ({text(settings.get('spectrum')).replace('_', ' ')})"
    if not isinstance(retained, Mapping):
        return f"{asked}; as share of the energy: {NOT_RECORDED}"
    if not retained.get("rank"):
        return f"{asked}, but nothing is cut: the inputs have no leading directions; ridge alone"
    return (
        f"{asked}: {_percent(retained.get('energy'))} of the energy of the inputs, in {_percent(retained.get('rank'))} "
        f"of their dimensions (means over {text(retained.get('layers'))} layers){_missed_energy(method)}"
    )


def _missed_energy(method: Mapping[str, Any]) -> str:
    sketched = method.get("sketched")
    if not isinstance(sketched, Mapping):
        return ""
    grams, missed = text(sketched.get("grams")), _percent(sketched.get("missed"))
    return f"; {grams} Grams are known from sketches, which miss {missed} of the energy at most"


def _percent(value: Any) -> str:
    return f"{value:.1%}" if is_finite(value) else UNDEFINED


def _layers(report: UnlearningReport) -> str:
    """Layers by the pattern of their names, such as `model.layers.*.mlp.up_proj` x 30."""
    patterns = Counter(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", str(name)) for name in report.drift.get("by_layer") or ())
    shown = ", ".join(f"{code(name)} x {n}" if n > 1 else code(name) for name, n in patterns.items())
    return f"{patterns.total()}: {shown}" if shown else NOT_RECORDED


def _drift(report: UnlearningReport) -> dict[str, str]:
    """Predicted from the statistics: relative output change, KL in nats, and the layers where it is largest."""
    layers = {name: value for name, value in (report.drift.get("by_layer") or {}).items() if is_finite(value)}
    largest = sorted(layers, key=lambda name: layers[name], reverse=True)[:3]
    # a run without statistics has an empty sum here, and zero would be a claim
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
            changes.append(f"{escape(UNITS.get(name, name))} {before.value:.3f} → {after.value:.3f} ({change:+.3f})")
    return changes


def _metric_rows(report: UnlearningReport, models: Sequence[str]) -> list[list[str]]:
    """Metric, split, a cell per model, and the number of rows behind them."""
    rows = []
    for name, split in dict.fromkeys((m.name, m.split) for m in report.metrics):
        found = [m for m in report.metrics if (m.name, m.split) == (name, split)]
        cells = ["; ".join(_value(m) for m in found if m.model == model) or NOT_MEASURED for model in models]
        counts = " / ".join(str(n) for n in dict.fromkeys(m.n for m in found))
        rows.append([escape(UNITS.get(name, name)), escape(split), *cells, counts])
    return rows


def _attack(metrics: Iterable[MetricValue], pattern: str) -> str:
    """One part per metric and split, in it the models in their usual order."""
    found = [m for m in metrics if re.search(pattern, f"{m.name} {m.split} {m.model}", re.IGNORECASE)]
    parts = []
    for name, split in dict.fromkeys((m.name, m.split) for m in found):
        own = [m for m in found if (m.name, m.split) == (name, split)]
        own.sort(key=lambda m: MODELS.index(m.model) if m.model in MODELS else len(MODELS))
        values = ", ".join(f"{escape(m.model)} {_value(m)}" for m in own)
        counts = " / ".join(str(n) for n in dict.fromkeys(m.n for m in own))
        parts.append(f"{escape(name)} on {escape(split)}: {values} (n = {counts})")
    return "; ".join(parts) or NOT_MEASURED


def _series(report: UnlearningReport) -> list[tuple[str, str]]:
    """Of one of several requests in a row: the room left, the drift used by all of them, and what it warns of."""
    about = report.series
    if not about:
        return []
    room, used = about.get("room") or {}, about.get("drift_used") or {}
    budget = "none" if used.get("budget") is None else text(used["budget"])
    rows = [
        ("input energy of the forget rows that the constraint left free", _percent(room.get("mean"))),
        ("predicted drift of all requests, relative", f"{text(used.get('relative'))} (budget: {budget})"),
    ]
    return rows + [("warning", escape(line)) for line in about.get("warnings") or ()]


def _undefined(metrics: Iterable[MetricValue]) -> list[str]:
    """Why a number has no value, each reason once."""
    reasons = (f"{code(m.name)} on {escape(m.split)}: {escape(m.reason)}" for m in metrics if m.reason)
    return list(dict.fromkeys(reasons))


def _picture(name: str) -> tuple[str, str]:
    """Description and address of a picture that lies beside the card."""
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


def _value(metric: MetricValue) -> str:
    if not is_finite(metric.value):
        return UNDEFINED
    bounded = is_finite(metric.low) and is_finite(metric.high)
    return f"{metric.value:.3f}" + (f" [{metric.low:.3f}, {metric.high:.3f}]" if bounded else "")


# Rendering


def _render(path: Path, variables: Mapping[str, Any]) -> str:
    """The rendered template; `SettingsError` names whatever it uses and does not get, in branches not taken too."""
    environment = SandboxedEnvironment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    try:
        source = path.read_text(encoding="utf-8")
        unknown = meta.find_undeclared_variables(environment.parse(source)) - variables.keys()
        if unknown:
            names = ", ".join(map(repr, sorted(unknown)))
            raise SettingsError(f"{path} uses {names}; a card has {', '.join(sorted(variables))}")
        return environment.from_string(source).render(variables)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"the card template {path} cannot be read ({error})") from error
    except TemplateSyntaxError as error:
        raise SettingsError(f"{path}, line {error.lineno}: {error.message}") from error
    except TemplateError as error:
        raise SettingsError(f"{path} cannot be rendered: {error}") from error
