"""Publishing a finished folder: `push_unlearned_model`, `trainer.push_to_hub()` and `hf-unlearn push` all use this."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import CommitInfo, ModelCard

from hf_unlearn.core.hub import push_folder
from hf_unlearn.core.published_files import WEIGHTS, publishable
from hf_unlearn.core.push_options import PushOptions
from hf_unlearn.errors import OutputError, SettingsError
from hf_unlearn.evaluation.report import REPORT, UnlearningReport
from hf_unlearn.publishing.card import write_card
from hf_unlearn.publishing.card_sections import REQUEST_FIELDS
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

    Only files on an allow-list are uploaded (`core.published_files.PUBLISHED`), and their hashes on the Hub are
    compared with the local ones. If a push fails, the same call resumes it.

    Args:
        report: The report, or the folder that contains it.
        model_dir: Folder with the weights. If `report` is the report of this folder, a missing card and missing plots
            are added; any other report replaces the report, card and plots there.
        repo_id: `user/repo`, or `repo` for the user who owns the token.
        private: Visibility of a repository that the push creates; if True, an existing public one is refused.
        token: Write token; default: `HF_TOKEN` or the token of `hf auth login`.
        revision: Branch, created if it does not exist; default: `main`.
        commit_message: First line of the commit.
        card_template: Your own template of the card; the card is then rendered again.
        update: Also push into a repository that has other files. Its older weights leave the branch but stay reachable
            by commit; see `purge_history`.
        publish_samples: The report may show its samples: prompts of forget rows, and answers to them.

    Returns:
        The commit (`huggingface_hub.CommitInfo`).

    Raises:
        PushError: The Hub could not be reached or refused the push; the message names the folder and the command that
            resumes.
        OutputError: `model_dir` or the report does not exist.
        SettingsError: The model is incomplete or cannot be loaded by others, the report names rows, a file contains an
            access token, or `update` or `private` rule the repository out.

    Example:

    >>> push_unlearned_model("missing", "missing", "me/model")
    Traceback (most recent call last):
        ...
    hf_unlearn.errors.OutputError: no folder missing; push the output folder of a run
    """
    options = PushOptions(private, token, revision, commit_message, update)
    return push_model_folder(
        report, model_dir, repo_id, options, card_template=card_template, publish_samples=publish_samples
    )


def push_model_folder(
    report: UnlearningReport | str | os.PathLike,
    model_dir: str | os.PathLike,
    repo_id: str,
    options: PushOptions,
    *,
    card_template: str | os.PathLike | None = None,
    publish_samples: bool = False,
) -> CommitInfo:
    """Publish as `push_unlearned_model` does, with the push's options in one object."""
    folder = Path(model_dir)
    if not folder.is_dir():
        raise OutputError(f"no folder {folder}; push the output folder of a run")
    _check_weights(folder)
    own_paths = (folder.resolve(), (folder / REPORT).resolve())
    is_own_report = not isinstance(report, UnlearningReport) and Path(report).resolve() in own_paths
    loaded = _load(report)
    check_public(loaded, publish_samples)
    complete_folder(folder, loaded, repo_id.rpartition("/")[2], card_template, replace=not is_own_report)
    flags = ["--publish_samples"] if publish_samples else []
    return push_folder(folder, repo_id, publishable(folder), options, flags=flags)


def complete_folder(
    folder: Path,
    report: UnlearningReport,
    model_name: str,
    card_template: str | os.PathLike | None = None,
    replace: bool = True,
) -> None:
    """Write report, plots and card to the folder of the weights.

    Args:
        folder: The folder.
        report: The report.
        model_name: Title of the card.
        card_template: Your own template of the card.
        replace: Replace existing files; if False, only missing ones are written.

    Raises:
        SettingsError: `replace` is False and README.md is not the card of an unlearned model.
    """
    if replace or not (folder / REPORT).is_file():
        report.save(folder)
    pictures = publishable(folder, ["plots/*.png"])
    if replace or not pictures:
        for name in PICTURES:  # they may be of another report
            (folder / "plots" / name).unlink(missing_ok=True)
        pictures = [path.relative_to(folder).as_posix() for path in save_plots(report, folder / "plots")]
    if replace or card_template is not None or not (folder / "README.md").is_file():
        write_card(report, folder, model_name=model_name, template=card_template, plots=pictures)
    elif "machine-unlearning" not in _tags(folder / "README.md"):
        raise SettingsError(
            f"{folder / 'README.md'} is not the card of an unlearned model; remove it to have one written from the "
            "report, or pass a template (--card_template)"
        )


def check_public(report: UnlearningReport, publish_samples: bool = False) -> None:
    """Raise `SettingsError` if a report contains more than may be published of a request: texts, ids, answers."""
    if report.samples and not publish_samples:
        raise SettingsError(
            f"the report shows {len(report.samples)} prompts of forget rows and answers to them; if they may be "
            "published, pass publish_samples=True (--publish_samples), else run again without samples"
        )
    private = [name for name in report.request if name not in REQUEST_FIELDS]
    private += [name for name, value in report.request.items() if isinstance(value, (list, tuple, set, Mapping))]
    if private:
        raise SettingsError(
            f"the report's request has {private[0]!r}, and a published report must not name rows; keep only "
            f"{', '.join(REQUEST_FIELDS)}, with the rows as a number"
        )


def _load(report: UnlearningReport | str | os.PathLike) -> UnlearningReport:
    if isinstance(report, UnlearningReport):
        return report
    path = Path(report)
    if path.is_dir() and not (path / REPORT).is_file():
        raise OutputError(
            f"{path} has no {REPORT}, and a model is published only with a report of its request: `hf-unlearn run` and "
            "`hf-unlearn evaluate --output_dir` write one; or pass an UnlearningReport to push_unlearned_model"
        )
    return UnlearningReport.load(path)


def _check_weights(folder: Path) -> None:
    """Raise `SettingsError` unless all weights exist and others can load them."""
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
    except Exception:  # the errors of yaml and of huggingface_hub share no base class
        return []
