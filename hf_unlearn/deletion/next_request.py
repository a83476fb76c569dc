"""The next request of a series, from the settings of a run and the ledger that they name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_unlearn.constraints.registry import setting_names
from hf_unlearn.data.formats import Row
from hf_unlearn.deletion.arguments import RunArguments
from hf_unlearn.deletion.ledger import open_ledger
from hf_unlearn.deletion.rows import RowEncoding, locate_forget_rows, rows_at
from hf_unlearn.deletion.series import BegunRequest, RequestSeries, raised_energy
from hf_unlearn.errors import ModelError, SettingsError
from hf_unlearn.trainer.config import UnlearningConfig

if TYPE_CHECKING:
    from hf_unlearn.models.tasks import ProcessingClass


def open_series(args: RunArguments, constraints: Sequence[str]) -> RequestSeries | None:
    """Return the series of `args.ledger`, or None if no ledger is named.

    Args:
        args: What the run is asked to do.
        constraints: Names of the constraints of the run; a series takes one.

    Raises:
        SettingsError: Settings that a series does not allow, or that need one.
        LedgerError: No key, or a damaged ledger.
    """
    if args.ledger is None:
        for name in ("energy_step", "forget_again"):
            if getattr(args, name):
                raise SettingsError(f"{name} needs a series of requests; pass --ledger with it")
        return None
    if len(constraints) > 1:
        raise SettingsError("the next request of a ledger starts from one model; run one constraint only")
    if args.use_peft and not args.merge_adapter:
        raise SettingsError(
            "the next request of a ledger starts from a complete model; pass --merge_adapter True with --use_peft"
        )
    if args.ledger_key_file and Path(args.ledger).resolve() in Path(args.ledger_key_file).resolve().parents:
        raise SettingsError(f"{args.ledger_key_file} is in the folder of the ledger; keep the key elsewhere")
    return RequestSeries(open_ledger(args.ledger, args.ledger_key_file))


def next_config(args: RunArguments, config: UnlearningConfig, series: RequestSeries) -> UnlearningConfig:
    """Return the settings of the next request: its energy, and what is left of the drift budget.

    Raises:
        SettingsError: No drift budget is left, or the constraint has no energy to raise.
    """
    changes: dict[str, Any] = {}
    if args.energy_step:
        changes |= _raised_energies(args, config, series.number)
    if config.max_retain_drift is not None:
        left = config.max_retain_drift - series.drift_used
        if left <= 0:
            raise SettingsError(
                f"the {len(series.completed)} requests of {args.ledger} have used {series.drift_used:.4f} of "
                f"max_retain_drift {config.max_retain_drift}: nothing is left; retrain, or raise it"
            )
        changes["max_retain_drift"] = left
    return config.but(**changes) if changes else config


def _raised_energies(args: RunArguments, config: UnlearningConfig, number: int) -> dict[str, Any]:
    """Return the constraint settings of request `number`, of all layers and by layer pattern."""
    if "energy" not in setting_names(config.constraint):
        raise SettingsError(f"energy_step needs a constraint with a setting energy; {config.constraint!r} has none")
    settings, by_pattern = config.constraint_settings or {}, config.layer_constraints or {}
    assert isinstance(settings, dict) and isinstance(by_pattern, dict)  # UnlearningConfig parses both
    raised_by_pattern = {
        pattern: raised_energy(layer_settings, args.energy_step, number)
        if "energy" in layer_settings
        else layer_settings
        for pattern, layer_settings in by_pattern.items()
    }
    return {
        "constraint_settings": raised_energy(settings, args.energy_step, number),
        "layer_constraints": raised_by_pattern or None,
    }


def last_model(args: RunArguments, series: RequestSeries | None) -> str | None:
    """Return the model to start from, or None before the first request of a series and outside of one.

    It is where the last request wrote it, or `args.model_name_or_path` if it was moved.

    Raises:
        ModelError: It was moved, and no new place is named.
    """
    if series is None or series.model_folder is None:
        return None
    if Path(series.model_folder).is_dir():
        return series.model_folder
    if not args.model_name_or_path:
        raise ModelError(
            f"the last request's model is no longer in {series.model_folder}; pass its new place as "
            "--model_name_or_path"
        )
    return args.model_name_or_path


def begin_request(
    args: RunArguments, series: RequestSeries, tokenizer: ProcessingClass, encoding: RowEncoding
) -> tuple[BegunRequest, Mapping[str, Sequence[Row]]]:
    """Commit to the forget rows, and encode those of earlier requests.

    Returns:
        The begun request, and the earlier rows by their split names in the report, `forgotten_1`, ...

    Raises:
        DataError: A forget row was in an earlier request.
        LedgerError: A key that is not the ledger's.
    """
    where = locate_forget_rows(args)
    earlier = series.earlier(rows_at)
    begun = series.begin(rows_at(where), where=where, untested=earlier.untested)
    encoded = {
        f"forgotten_{number}": encoding.encode(rows, tokenizer, f"forgotten {number}")
        for number, rows in earlier.rows.items()
    }
    return begun, encoded
