"""A finished folder to the Hub: `push_unlearned_model`, `trainer.push_to_hub()` and `hf-unlearn push` all go here."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitInfo, ModelCard

from hf_unlearn.core.hub import push_folder
from hf_unlearn.core.published_files import WEIGHTS, publishable
from hf_unlearn.errors import OutputError, SettingsError
from hf_unlearn.evaluation.report import REPORT, UnlearningReport
from hf_unlearn.publishing.card import REQUEST_FIELDS, write_card
from hf_unlearn.publishing.plots import PICTURES, save_plots


def push_unlearned_model(
    report: UnlearningReport | str | os.PathLike,
    model_dir: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Unlearned model",
    card_template: str | os.PathLike | None = None,
    update: bool = False,
    publish_samples: bool = False,
) -> CommitInfo:
    """Publish a model or adapter with its report, card and plots, and nothing else of its folder.

    Only files on a list leave (`hub.PUBLISHED`), and the hashes on the Hub are compared with the local ones. A re-run
    resumes.

    Args:
        report: The report, or the folder that has it.
        model_dir: Folder with the weights. If `report` is its own, what is missing of card and plots is added; any
            other takes the place of report, card and plots there.
        repo_id, private, token, revision, commit_message, update: As in `hub.push_folder`.
        card_template: Your own template of the card, which is rendered anew then.
        publish_samples: The report may show its samples: prompts of forget rows, and answers to them.

    Raises:
        PushError: See `hub.push_folder`.
        OutputError: No such folder, or no report in it.
        SettingsError: What would be published is incomplete, is nobody else's to load, or names rows.
    """
    folder = Path(model_dir)
    if not folder.is_dir():
        raise OutputError(f"there is no folder {folder}; push the output folder of a run")
    _check_weights(folder)
    homes = (folder.resolve(), (folder / REPORT).resolve())
    own = not isinstance(report, UnlearningReport) and Path(report).resolve() in homes
    loaded = _load(report)
    check_public(loaded, publish_samples)
    complete_folder(folder, loaded, repo_id.rpartition("/")[2], card_template, anew=not own)
    return push_folder(
        folder, repo_id, publishable(folder), private=private, token=token, revision=revision,
        commit_message=commit_message, update=update, flags=["--publish_samples"] if publish_samples else [],
    )  # fmt: skip


def complete_folder(
    folder: Path,
    report: UnlearningReport,
    model_name: str,
    card_template: str | os.PathLike | None = None,
    anew: bool = True,
) -> None:
    """Write report, plots and card beside the weights; without `anew` only what is missing.

    Raises:
        SettingsError: A README.md that is no card of an unlearned model.
    """
    if anew or not (folder / REPORT).is_file():
        report.save(folder)
    pictures = publishable(folder, ["plots/*.png"])
    if anew or not pictures:
        for name in PICTURES:  # of another report
            (folder / "plots" / name).unlink(missing_ok=True)
        pictures = [path.relative_to(folder).as_posix() for path in save_plots(report, folder / "plots")]
    if anew or card_template is not None or not (folder / "README.md").is_file():
        write_card(report, folder, model_name=model_name, template=card_template, plots=pictures)
    elif "machine-unlearning" not in _tags(folder / "README.md"):
        raise SettingsError(
            f"{folder / 'README.md'} is not the card of an unlearned model; remove it to have one made from the "
            "report, or pass a template (--card_template)"
        )


def check_public(report: UnlearningReport, publish_samples: bool = False) -> None:
    """Raise `SettingsError` where a report holds more than may be known of a request: texts, ids, answers."""
    if report.samples and not publish_samples:
        raise SettingsError(
            f"the report shows {len(report.samples)} prompts of forget rows and answers to them; if they may be "
            "published, pass publish_samples=True (--publish_samples), else run again without samples"
        )
    odd = [name for name in report.request if name not in REQUEST_FIELDS]
    odd += [name for name, value in report.request.items() if isinstance(value, (list, tuple, set, Mapping))]
    if odd:
        raise SettingsError(
            f"the report's request has {odd[0]!r}, and a published one must not name rows; keep only "
            f"{', '.join(REQUEST_FIELDS)}, with the rows as a number"
        )


def _load(report: UnlearningReport | str | os.PathLike) -> UnlearningReport:
    if isinstance(report, UnlearningReport):
        return report
    path = Path(report)
    if path.is_dir() and not (path / REPORT).is_file():
        raise OutputError(
            f"{path} has no {REPORT}, and a model is published only with what was asked and measured: `hf-unlearn run` "
            "and `hf-unlearn evaluate --output_dir` write one; or pass an UnlearningReport to push_unlearned_model"
        )
    return UnlearningReport.load(path)


def _check_weights(folder: Path) -> None:
    """Raise `SettingsError` unless all weights are there and whoever loads them finds what they need."""
    weights = publishable(folder, WEIGHTS)
    if not any(name.endswith(".safetensors") for name in weights):
        raise SettingsError(f"{folder} has no weights in safetensors; save them there with save_pretrained")
    for name in weights:
        if name.endswith(".index.json"):
            index = json.loads((folder / name).read_text(encoding="utf-8"))
            missing = sorted(set(index["weight_map"].values()) - set(weights))
            if missing:
                raise SettingsError(f"{folder} lacks {', '.join(missing)} of {name}; save the model again")
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        if not base or Path(base).is_absolute() or Path(base).exists():
            raise SettingsError(
                f"{adapter} names no base model that others can load; run with --base_model NAME@REVISION (its id on "
                "the Hub), or write the merged model with --merge_adapter True"
            )


def _tags(card: Path) -> list[str]:
    try:
        return ModelCard(card.read_text(encoding="utf-8")).data.to_dict().get("tags") or []
    except Exception:  # yaml's errors and huggingface_hub's own share no base class
        return []
