"""Entries of a ledger: their hash chain and MACs, and what is wrong with a sequence of lines."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from hf_unlearn.deletion.ledger_key import FORMAT_VERSION

if TYPE_CHECKING:
    from hf_unlearn.deletion.ledger_key import LedgerKey

GENESIS_HASH = "0" * 64


@dataclass(frozen=True)
class Entry:
    """One line of a ledger.

    Attributes:
        index: Position in the ledger, from 0.
        time: UTC, ISO 8601.
        kind: `created` (the first entry), `request` (a completed one), `push`.
        content: What `series_entry.SeriesEntry` and `Ledger.record_push` put there.
        previous: Hash of the entry before; 64 zeros for the first.
        mac: HMAC under the key of the SHA-256 of all of the above.
        hash: SHA-256 of all of the above and the MAC.
    """

    index: int
    time: str
    kind: str
    content: dict[str, Any]
    previous: str
    mac: str = ""
    hash: str = ""

    def line(self) -> bytes:
        """Return the entry as the line of `ledger.jsonl`."""
        return _canonical(asdict(self)) + b"\n"

    def digest(self, *without: str) -> str:
        """Return the SHA-256 of the entry without some of its fields."""
        return hashlib.sha256(_canonical({k: v for k, v in asdict(self).items() if k not in without})).hexdigest()


@dataclass(frozen=True)
class Verdict:
    """What `Ledger.verify` found.

    Attributes:
        entries: The entries before the first damaged line.
        problems: Damage, one line each.
        notes: Traces of a crash, which the next append repairs.
        keyed: Whether the MACs were checked.
        size: Bytes of the complete entries; anything after them is a torn append.
        behind: `head.json` does not count the last entry yet.
    """

    entries: tuple[Entry, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    keyed: bool
    size: int
    behind: bool

    @property
    def intact(self) -> bool:
        """Whether nothing is damaged."""
        return not self.problems

    @property
    def head(self) -> str:
        """Hash of the last entry: the one value to keep elsewhere."""
        return self.entries[-1].hash if self.entries else GENESIS_HASH


def new_entry(entries: Sequence[Entry], kind: str, content: Mapping[str, Any], key: LedgerKey) -> Entry:
    """Return the entry that continues `entries`, with its MAC and hash."""
    time = datetime.now(timezone.utc).isoformat(timespec="seconds")
    previous = entries[-1].hash if entries else GENESIS_HASH
    content_as_read = json.loads(_canonical(content))
    entry = Entry(len(entries), time, kind, content_as_read, previous)
    entry = replace(entry, mac=key.mac("entry", entry.digest("mac", "hash")))
    return replace(entry, hash=entry.digest("hash"))


def created_content(key: LedgerKey) -> dict[str, Any]:
    """Return the content of the first entry."""
    return {"format_version": FORMAT_VERSION, "key_check": key.mac("key check")}


def read_entries(lines: Sequence[bytes], key: LedgerKey | None) -> tuple[list[Entry], list[str]]:
    """Return the entries before the first damaged line, and what is wrong with that line.

    Args:
        lines: Without their newlines.
        key: Checks the MACs too; without it the hash chain is checked alone.
    """
    entries: list[Entry] = []
    for index, line in enumerate(lines):
        entry, problem = _read_entry(line, index, entries[-1].hash if entries else GENESIS_HASH, key)
        if entry is None:
            return entries, [f"line {index + 1}: {problem}"]  # the lines after it depend on it
        entries.append(entry)
    return entries, []


def _read_entry(line: bytes, index: int, previous: str, key: LedgerKey | None) -> tuple[Entry | None, str]:
    """Return the entry on a line, or None and what is wrong with it."""
    try:
        content = json.loads(line)
        entry = Entry(**content)
    except (ValueError, TypeError, RecursionError):
        return None, "is not an entry"
    if not isinstance(content["content"], dict):
        return None, "is not an entry"
    if entry.line() != line + b"\n" or entry.digest("hash") != entry.hash:
        return None, "was edited: it does not match its hash"
    if entry.index != index or entry.previous != previous:
        return None, "does not follow the line before: entries were removed, inserted or reordered"
    if index == 0 and (entry.kind != "created" or entry.content.get("format_version", 0) > FORMAT_VERSION):
        return None, f"is not a valid first entry of a ledger of format {FORMAT_VERSION}"
    if key is not None:
        if index == 0 and not key.matches(entry.content.get("key_check"), "key check"):
            return None, "the ledger was made with another key"
        if not key.matches(entry.mac, "entry", entry.digest("mac", "hash")):
            return None, "was written without the key: its MAC is wrong"
    return entry, ""


def _canonical(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
