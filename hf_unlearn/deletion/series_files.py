"""Where a series keeps what its next request needs: `_private/` inside the ledger's folder."""

import json
from pathlib import Path
from typing import TypedDict

from hf_unlearn.deletion.ledger_entries import Entry
from hf_unlearn.errors import LedgerError

PRIVATE, RECORD, STATISTICS = "_private", "request.json", "statistics"


class RequestRecord(TypedDict):
    """The content of `request.json`.

    `model` is the folder of the unlearned model, `where` finds the forget rows again, `room` is the mean room that was
    left, and `drift_used` has the summed predicted drifts by layer.
    """

    model: str
    where: dict[str, object]
    room: float | None
    drift_used: dict[str, float]


def private_folder(ledger_folder: Path, number: int, nonce: str) -> Path:
    """Return the private folder of a request."""
    return ledger_folder / PRIVATE / f"{number:04d}-{nonce[:8]}"


def folder_of_entry(ledger_folder: Path, entry: Entry) -> Path:
    """Return the private folder of a completed request."""
    return private_folder(ledger_folder, entry.content["request"], entry.content["nonce"])


def read_record(ledger_folder: Path, entry: Entry) -> RequestRecord:
    """Read the record of a completed request; raises `LedgerError` if it is missing or damaged."""
    path = folder_of_entry(ledger_folder, entry) / RECORD
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LedgerError(
            f"{path} cannot be read ({error}): without {PRIVATE} no request can follow; restore it, or begin another "
            "ledger"
        ) from error
