"""The output folder of a request: where it may be, what is saved there, and its push."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from hf_unlearn.core.files import check_output
from hf_unlearn.core.processes import is_main
from hf_unlearn.deletion.request import DeletionRequest
from hf_unlearn.errors import SettingsError
from hf_unlearn.evaluation.report import UnlearningReport
from hf_unlearn.models.adapters import merged_state_dict
from hf_unlearn.models.fingerprint import state_fingerprint, weights_fingerprint
from hf_unlearn.publishing.model_folder import push_model_folder
from hf_unlearn.trainer.config import UnlearningConfig
from hf_unlearn.trainer.hub import push_options
from hf_unlearn.trainer.run_record import name_base_model
from hf_unlearn.trainer.trainer import UnlearningTrainer

DEFAULT_OUTPUT = "unlearned"


def check_target(request: DeletionRequest, config: UnlearningConfig) -> Path:
    """Return the output folder of a request, or raise an error if the request must not be written there.

    Raises:
        OutputError: The folder is not empty and `overwrite_output_dir` is false.
        SettingsError: A request in a series whose output folder would replace the model or the ledger of the series,
            or whose adapter is not merged.
    """
    target = check_output(config.output_dir or DEFAULT_OUTPUT, config.overwrite_output_dir)
    if request.series is None:
        return target
    series = request.series.series
    if request.adapter is not None and not request.adapter.merge:
        raise SettingsError(
            "the next request of a series starts from a complete model; pass merge_adapter (--merge_adapter True)"
        )
    if series.model_folder is not None and Path(series.model_folder) == target.resolve():
        raise SettingsError(f"{target} has the model that this request starts from; choose another --output_dir")
    ledger = series.ledger.folder.resolve()
    if target.resolve() in (ledger, *ledger.parents):
        raise SettingsError(f"the ledger {ledger} must not be inside the output folder {target}, which is replaced")
    return target


@contextmanager
def checkpoint_folder(target: Path) -> Iterator[Path]:
    """Yield a folder next to `target` for the trainer's checkpoints; it is removed at the end if it is empty."""
    folder = target.with_name(f"{target.name}.checkpoints")
    try:
        yield folder
    finally:
        if is_main() and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def merges_adapter(request: DeletionRequest) -> bool:
    """Return whether an adapter is trained and merged into the saved model."""
    return request.adapter is not None and request.adapter.merge


def save_model(
    folder: Path,
    request: DeletionRequest,
    trainer: UnlearningTrainer,
    state: Mapping[str, Tensor] | None,
    config: UnlearningConfig,
) -> None:
    """Save the unlearned model or its adapter, and the processing class, to `folder`.

    Args:
        folder: An existing folder.
        request: Says whether an adapter is merged.
        trainer: Its model has the unlearned weights.
        state: The weights, if they were sharded over processes and are gathered; else None.
        config: Names the base model of an adapter.
    """
    models = request.models
    name_base_model(trainer.model, config)
    if merges_adapter(request):
        save: Callable[..., None] = models.original.save_pretrained  # type: ignore[assignment]
        save(folder, state_dict=merged_state_dict(trainer.model, state))
    else:
        trainer.model.save_pretrained(folder, state_dict=state)
    if models.processing_class is not None:
        models.processing_class.save_pretrained(folder)


def saved_fingerprint(request: DeletionRequest, trainer: UnlearningTrainer, state: Mapping[str, Tensor] | None) -> str:
    """Return the fingerprint that the saved weights have once they are loaded again; arguments as in `save_model`."""
    original = request.models.original
    if state is not None:  # gathered weights are not tied any more; those of a loaded model are
        tied = getattr(original, "all_tied_weights_keys", None) or {}
        state = {**state, **{name: state[source] for name, source in tied.items() if source in state}}
    if request.adapter is not None:
        return state_fingerprint(merged_state_dict(trainer.model, state))
    return weights_fingerprint(trainer.model) if state is None else state_fingerprint(state)


def push_finished(request: DeletionRequest, folder: Path, report: UnlearningReport, config: UnlearningConfig) -> None:
    """Push a finished folder to the Hub, and record the push in the ledger if the request is in a series.

    Raises:
        PushError: The Hub did not accept it.
        SettingsError: What would be published is incomplete or names rows.
    """
    shows_samples = bool(report.samples)  # which were asked for
    repo_id, options = config.hub_model_id or folder.name, push_options(config)
    commit = push_model_folder(folder, folder, repo_id, options, publish_samples=shows_samples)
    if request.series is not None:
        ledger = request.series.series.ledger
        ledger.record_push(report.request["number"], commit.repo_url.repo_id, commit.oid)
