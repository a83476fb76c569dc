"""The model card: the README.md of an unlearned model, rendered from its `UnlearningReport`.

The card says only what the report says. Missing numbers read "not measured" or "not recorded", numbers without a finite
value "undefined"; nothing is left blank. The card names no row.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, meta
from jinja2.sandbox import SandboxedEnvironment

from hf_unlearn.core.files import replace_file
from hf_unlearn.core.text import is_finite
from hf_unlearn.errors import SettingsError
from hf_unlearn.evaluation.report import MetricValue, UnlearningReport
from hf_unlearn.publishing.card_sections import names_base_model, template_variables

TEMPLATE = "model_card_template.md"


def write_card(
    report: UnlearningReport,
    folder: str | os.PathLike,
    *,
    model_name: str,
    template: str | os.PathLike | None = None,
    plots: Sequence[str] = (),
) -> Path:
    """Write README.md into `folder` atomically, and return its path; arguments and errors as in `render_card`.

    Example:

    >>> import tempfile
    >>> from hf_unlearn.evaluation.report import UnlearningReport
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_card(UnlearningReport(), folder, model_name="tiny").name
    'README.md'
    """
    target = Path(folder) / "README.md"
    content = render_card(report, model_name=model_name, template=template, plots=plots)
    target.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(target) as temporary:
        temporary.write_text(content, encoding="utf-8")
    return target


def render_card(
    report: UnlearningReport,
    *,
    model_name: str,
    template: str | os.PathLike | None = None,
    plots: Sequence[str] = (),
) -> str:
    """Render the card's text, metadata block first; huggingface_hub must be able to read the metadata back.

    Args:
        report: Everything that the card says.
        model_name: Title, and name of the model in the `model-index`.
        template: Your own Jinja template; it gets the same variables as the package's, safe for Markdown.
        plots: Pictures to embed, as paths relative to the card.

    Raises:
        SettingsError: The template cannot be read or parsed, uses a variable that does not exist, or has no metadata
            block; or a plot is not a relative path.

    Example:

    >>> from hf_unlearn.evaluation.report import UnlearningReport
    >>> card = render_card(UnlearningReport(request={"rows": 20}), model_name="tiny")
    >>> [line for line in card.splitlines() if line.startswith("| rows to forget")]
    ['| rows to forget | 20 |']
    """
    path = Path(template) if template is not None else default_template()
    variables = {"card_data": card_data(report, model_name).to_yaml(), **template_variables(report, model_name, plots)}
    content = _render(path, variables)
    try:
        metadata = ModelCard(content).data.to_dict()
    except Exception as error:  # the errors of yaml and of huggingface_hub share no base class
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
    """Return the package's template: in the package's folder in a wheel, in the repository's root otherwise."""
    here = Path(__file__).resolve().parent
    for folder in (here, here.parents[1]):
        if (folder / TEMPLATE).is_file():
            return folder / TEMPLATE
    raise SettingsError(f"{TEMPLATE} is neither in {here} nor in {here.parents[1]}; pass your own as `template`")


def card_data(report: UnlearningReport, model_name: str) -> ModelCardData:
    """Return the metadata that the Hub indexes: tags, base model, task, licence, language, data sets and results.

    The results are the finite metrics of this model; those of the original and the retrained model are in the text.
    Licence, language and data sets are left out if they were not recorded.
    """
    method, task = report.method, report.method.get("task")
    names = [str(method[key]) for key in ("loss", "constraint") if method.get(key) not in (None, "", "none")]
    adapter = _is_unmerged_adapter(method)
    relation = "adapter" if adapter else "finetune"
    base = {"base_model": method["base_model"], "base_model_relation": relation} if names_base_model(method) else {}
    own = [metric for metric in report.metrics if metric.model == "unlearned" and is_finite(metric.value)]
    results = [_eval_result(metric, str(task or "other")) for metric in own]
    facts = method.get("card") or {}
    return ModelCardData(
        model_name=model_name if results else None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag=str(task) if task else None,
        license=facts.get("license"),
        language=facts.get("language"),
        datasets=facts.get("datasets"),
        tags=["machine-unlearning", "hf_unlearn", *names],
        eval_results=results or None,
        **base,
    )


def _is_unmerged_adapter(method: Mapping[str, Any]) -> bool:
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


def _render(path: Path, variables: Mapping[str, Any]) -> str:
    """Render the template; unknown variables raise `SettingsError`, in branches that are not taken too."""
    environment = SandboxedEnvironment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    try:
        source = path.read_text(encoding="utf-8")
        unknown = meta.find_undeclared_variables(environment.parse(source)) - variables.keys()
        if unknown:
            names = ", ".join(map(repr, sorted(unknown)))
            raise SettingsError(f"{path} uses {names}; the variables of a card are {', '.join(sorted(variables))}")
        return environment.from_string(source).render(variables)
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"the card template {path} cannot be read ({error})") from error
    except TemplateSyntaxError as error:
        raise SettingsError(f"{path}, line {error.lineno}: {error.message}") from error
    except TemplateError as error:
        raise SettingsError(f"{path} cannot be rendered: {error}") from error
