"""The next of several requests in a row, from the settings of a run and the ledger that it names."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_unlearn.constraints.registry import setting_names
from hf_unlearn.data.encoding import encode_dataset
from hf_unlearn.deletion.arguments import RunArguments
from hf_unlearn.deletion.ledger import open_ledger
from hf_unlearn.deletion.rows import selected_rows, where_selected
from hf_unlearn.deletion.series import RequestSeries, stepped
from hf_unlearn.errors import ModelError, SettingsError
from hf_unlearn.trainer.config import UnlearningConfig


def open_series(args: RunArguments, names: Sequence[str]) -> RequestSeries | None:
    if args.ledger is None:
        for name in ("energy_step", "forget_again"):
            if getattr(args, name):
                raise SettingsError(f"{name} is of requests in a row; pass --ledger with it")
        return None
    if len(names) > 1:
        raise SettingsError("a ledger goes on from one model; run one constraint, without --constraints")
    if args.use_peft and not args.merge_adapter:
        raise SettingsError("a ledger goes on from whole models; pass --merge_adapter True with --use_peft")
    if args.ledger_key_file and Path(args.ledger).resolve() in Path(args.ledger_key_file).resolve().parents:
        raise SettingsError(f"{args.ledger_key_file} is in the ledger's own folder; keep its key elsewhere")
    return RequestSeries(open_ledger(args.ledger, args.ledger_key_file))


def continued(args: RunArguments, config: UnlearningConfig, series: RequestSeries) -> UnlearningConfig:
    """The settings of the request to come: its energy, and what is left of the drift budget."""
    changes: dict[str, Any] = {}
    if args.energy_step:
        if "energy" not in setting_names(config.constraint):
            raise SettingsError(f"energy_step needs a constraint with a setting energy; {config.constraint!r} has none")
        base, by_layer = config.constraint_settings or {}, config.layer_constraints or {}
        assert isinstance(base, dict) and isinstance(by_layer, dict)  # or the configuration would not exist
        changes["constraint_settings"] = stepped(base, args.energy_step, series.number)
        changes["layer_constraints"] = {
            pattern: stepped(own, args.energy_step, series.number) if "energy" in own else own
            for pattern, own in by_layer.items()
        } or None
    if config.max_retain_drift is not None:
        left = config.max_retain_drift - series.drift_used
        if left <= 0:
            raise SettingsError(
                f"the {len(series.done)} requests of {args.ledger} have used {series.drift_used:.4f} of "
                f"max_retain_drift {config.max_retain_drift}: no room is left; retrain, or raise it"
            )
        changes["max_retain_drift"] = left
    return config.but(**changes) if changes else config


def last_model(args: RunArguments, series: RequestSeries | None) -> str | None:
    """The model to go on from: where the last request wrote it, or the one named if it was moved."""
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


def begin(args: RunArguments, series: RequestSeries, tokenizer: Any, **how: Any) -> dict[str, Any]:
    """Commit to the forget rows, and find those of earlier requests, encoded, by the split names of the report."""
    where = where_selected(args)
    series.begin(selected_rows(where), where)
    return {
        f"forgotten_{number}": encode_dataset(rows, tokenizer, what=f"forgotten {number}", **how)
        for number, rows in series.earlier(selected_rows).items()
    }
