"""Checkpoints to resume from: sealed when complete, refused when they belong to another run.

A process may be killed while a checkpoint is written. The seal, `unlearning_state.json`, is written last, by rename,
and has the hash of every other file: a folder without it, or whose files differ from it, is no checkpoint.
"""

import json
import os
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from hf_unlearn.errors import SettingsError
from hf_unlearn.files import sha256_of, write_json

SEAL = "unlearning_state.json"
PREVIOUS = "previous.safetensors"
_ANY = (True, "True", "true", "latest")

logger = logging.get_logger(__name__)


def seal(folder: Path, run: dict[str, Any]) -> None:
    """Declare `folder` a complete checkpoint of the run that `run` describes."""
    write_json(folder / SEAL, {"run": run, "files": _hashes(folder)})


def find_checkpoint(asked: str | bool | None, output_dir: str | os.PathLike) -> Path | None:
    """The checkpoint to resume from: a folder by name, or with True the newest complete one, if there is any.

    Raises:
        SettingsError: The folder named is no complete checkpoint.
    """
    if asked in (None, False, "False", "false"):
        return None
    if asked not in _ANY:
        folder = Path(str(asked))
        if read_seal(folder) is None:
            raise SettingsError(
                f"{folder} is no complete checkpoint of an unlearning run; resume_from_checkpoint=True takes the "
                f"newest complete one of {output_dir}"
            )
        return folder
    found = [f for f in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*") if f.name.rpartition("-")[2].isdigit()]
    for folder in sorted(found, key=lambda f: -int(f.name.rpartition("-")[2])):
        if read_seal(folder) is not None:
            return folder
        logger.warning(f"{folder} is incomplete and is left aside")
    logger.warning(f"there is no complete checkpoint in {output_dir}: the run starts from the beginning")
    return None


def read_seal(folder: Path) -> dict[str, Any] | None:
    """What `seal` was given, or None where the folder is incomplete or altered."""
    try:
        content = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        return content["run"] if content["files"] == _hashes(folder) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def check_same_run(folder: Path, now: dict[str, Any]) -> dict[str, Any]:
    """The sealed description of a complete checkpoint's run; raises `SettingsError` where it differs from `now`."""
    then = json.loads((folder / SEAL).read_text(encoding="utf-8"))["run"]
    for name, value in now.items():
        seen = then.get(name)
        if seen != json.loads(json.dumps(value)):
            raise SettingsError(
                f"{folder} was written by a run with {name} {_short(seen)}, this one has {_short(value)}; resume with "
                "the same, or start anew without resume_from_checkpoint"
            )
    return then


def _hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {p.relative_to(folder).as_posix(): sha256_of(p) for p in sorted(files) if SEAL not in p.name}


def _short(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
