"""`Ledger`: the append-only record of deletion requests, which reveals no row to anyone without the key.

A ledger is a folder:

    ledger.jsonl  one entry per line, each with the hash of the entry before (a hash chain) and a MAC under the key
    head.json     number of entries and hash of the last one, replaced after each append
    lock          held while reading or appending
    _private/     what the next request needs (`series_files`); must not be published

Rows appear only as HMAC-SHA256 (RFC 2104) of their content under the key and a nonce of the request: without the key
nobody can test a guess, or see that two requests have a row in common. No file of the ledger contains the key.

What `verify` detects: with or without the key, any edited, removed, inserted or reordered entry, and entries missing at
the end (head.json counts them). With the key also entries, heads and complete ledgers that were written without it.
What nothing in the folder can show: that all of it was reset to an older state, or that somebody with the key wrote a
new history. Against both, keep an entry's hash or a commitment elsewhere, such as on a published model card, and let
`verify --anchor` look for it. Times are the writer's clock. A commitment records what was requested, not the result.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hf_unlearn.core.files import write_json
from hf_unlearn.data.formats import Row
from hf_unlearn.deletion.ledger_entries import Entry, Verdict, created_content, new_entry, read_entries
from hf_unlearn.deletion.ledger_key import KEY_VARIABLE, Commitment, LedgerKey, read_key
from hf_unlearn.errors import LedgerError

_LINES, _HEAD, _LOCK, _LOCK_SECONDS = "ledger.jsonl", "head.json", "lock", 60


class Ledger:
    """The ledger in `folder`. With a key it can append, check MACs and find rows.

    Any number of processes may append at the same time: each holds a file lock, reads the ledger again and verifies it
    before it writes. A process that is killed at any moment leaves a ledger that verifies. The next append cuts off a
    torn last line, which was never reported as written, and records that it did.

    >>> import secrets, tempfile
    >>> key = secrets.token_bytes(32)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     ledger = Ledger(folder, key)
    ...     commitment = ledger.commit([{"text": "Anna is a pilot."}])
    ...     content = {"request": 1, "nonce": commitment.nonce, "rows": commitment.rows}
    ...     entry = ledger.append("request", content)
    ...     print(ledger.verify().intact, len(ledger.prove({"text": "Anna is a pilot."})))
    True 1

    Args:
        folder: It is made by the first append.
        key: At least 32 random bytes; None can only read.

    Raises:
        LedgerError: The key is too short.
    """

    def __init__(self, folder: str | os.PathLike, key: bytes | None = None):
        self.folder = Path(folder)
        self._key = None if key is None else LedgerKey(key)

    def exists(self) -> bool:
        """Return whether the ledger has an entry."""
        return (self.folder / _LINES).is_file()

    def verify(self, anchors: Iterable[str] = ()) -> Verdict:
        """Read and check everything; damage is in the verdict, not raised.

        Args:
            anchors: Hashes of entries or commitments of requests, kept elsewhere, that the ledger must have.

        Raises:
            LedgerError: The folder has no ledger.
        """
        if not self.exists():
            raise LedgerError(f"{self.folder} has no ledger; `hf-unlearn run --ledger` makes one")
        with self._locked():
            verdict = self._examine()
        known = {e.hash for e in verdict.entries} | {e.content.get("commitment") for e in verdict.entries}
        missing = tuple(f"no entry or request has {anchor}" for anchor in anchors if anchor not in known)
        return replace(verdict, problems=verdict.problems + missing)

    def entries(self) -> tuple[Entry, ...]:
        """Return all entries, none before the first append; raises `LedgerError` if the ledger is damaged."""
        return self._require_intact(self.verify()).entries if self.exists() else ()

    def requests(self) -> list[Entry]:
        """Return the completed requests, oldest first; raises `LedgerError` if the ledger is damaged."""
        return [entry for entry in self.entries() if entry.kind == "request"]

    def append(self, kind: str, content: Mapping[str, Any], after: int | None = None) -> Entry:
        """Add an entry; the first append makes the ledger.

        Args:
            kind: See `Entry`.
            content: JSON without any row, text or id.
            after: Number of requests that the ledger must have, so that no other request was completed meanwhile.

        Raises:
            LedgerError: No key or a wrong one, a damaged ledger, another request meanwhile, or a lock that another
                process holds for too long.
        """
        if self._key is None:
            raise LedgerError(f"appending needs the ledger key: pass --ledger_key_file, or set {KEY_VARIABLE}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LedgerError(f"cannot make the ledger {self.folder} ({error.strerror})") from error
        if not os.access(self.folder, os.W_OK):
            raise LedgerError(f"the ledger {self.folder} cannot be written; nothing was appended")
        with self._locked():
            verdict = self._require_intact(self._examine())
            self._require_requests(verdict, after)
            if verdict.behind:  # so that head.json is never more than one entry behind
                self._write_head(verdict.entries, self._key)
            if not verdict.entries:
                created = new_entry((), "created", created_content(self._key), self._key)
                self._write(verdict.entries, created, verdict.size, self._key)
                verdict = self._examine()
            if verdict.notes and "torn" in verdict.notes[-1]:
                content = {**content, "torn_append_removed": True}
            entry = new_entry(verdict.entries, kind, content, self._key)
            self._write(verdict.entries, entry, verdict.size, self._key)
            return entry

    def commit(self, rows: Iterable[Row]) -> Commitment:
        """Commit to raw rows under a new nonce; equal rows count once. Raises `LedgerError` without a key."""
        return self._require_key().commit(rows)

    def tag(self, nonce: str, row: Row) -> str:
        """Return the commitment to one row under the nonce of a request; raises `LedgerError` without a key."""
        return self._require_key().tag(nonce, row)

    def holds(self, entry: Entry, rows: Iterable[Row]) -> bool:
        """Return whether a request was about exactly these rows; raises `LedgerError` without a key."""
        return sorted({self.tag(entry.content["nonce"], row) for row in rows}) == entry.content["rows"]

    def prove(self, row: Row) -> list[Entry]:
        """Return the completed requests that a row was in; raises `LedgerError` without the ledger's key."""
        requests = self.requests()
        return [entry for entry in requests if self.tag(entry.content["nonce"], row) in entry.content["rows"]]

    def record_push(self, request: int, repo_id: str, commit: str) -> Entry:
        """Record the Hub commit that published the model of request number `request`.

        Raises:
            LedgerError: The ledger does not have this request, or see `append`.
        """
        if request not in [entry.content["request"] for entry in self.requests()]:
            raise LedgerError(f"{self.folder} has no request {request}; `hf-unlearn ledger show` lists them")
        return self.append("push", {"request": request, "repo_id": repo_id, "commit": commit})

    def _require_key(self) -> LedgerKey:
        if self._key is None:
            raise LedgerError(f"this needs the ledger key: pass --ledger_key_file, or set {KEY_VARIABLE}")
        return self._key

    # Reading

    def _examine(self) -> Verdict:
        """Check everything but the anchors; the caller holds the lock."""
        raw = (self.folder / _LINES).read_bytes() if self.exists() else b""
        *lines, torn = raw.split(b"\n")
        entries, problems = read_entries(lines, self._key)
        counted, problem = self._check_head(entries, complete=not problems)
        if problem:
            problems.append(problem)
        notes = []
        if behind := not problems and counted < len(entries):
            notes.append(f"entry {len(entries) - 1} was written, but its writer was killed before it updated head.json")
        if torn:
            notes.append(f"the last line is torn ({len(torn)} bytes) by a killed append; the next append cuts it off")
        return Verdict(
            entries=tuple(entries),
            problems=tuple(problems),
            notes=tuple(notes),
            keyed=self._key is not None,
            size=len(raw) - len(torn),
            behind=behind or not entries,
        )

    def _check_head(self, entries: Sequence[Entry], complete: bool) -> tuple[int, str]:
        """Return the number of entries that head.json counts, and what is wrong with it."""
        path = self.folder / _HEAD
        if not path.is_file():
            return 0, f"{_HEAD} is missing" if len(entries) > 1 else ""
        try:
            head = json.loads(path.read_text(encoding="utf-8"))
            counted, last, mac = int(head["entries"]), str(head["hash"]), str(head["mac"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0, f"{_HEAD} cannot be read"
        if self._key is not None and not self._key.matches(mac, "head", str(counted), last):
            return counted, f"{_HEAD} was written without the key: its MAC is wrong"
        if not complete:
            return counted, ""
        if counted > len(entries):
            return counted, f"{counted - len(entries)} entries are missing at the end: {_HEAD} counts {counted}"
        if counted < 1 or entries[counted - 1].hash != last or len(entries) - counted > 1:
            return counted, f"{_HEAD} belongs to another state of the ledger"
        return counted, ""

    def _require_intact(self, verdict: Verdict) -> Verdict:
        if verdict.problems:
            raise LedgerError(
                f"the ledger {self.folder} cannot be trusted: {verdict.problems[0]}; check the key, or restore a copy "
                "that `hf-unlearn ledger verify` finds intact"
            )
        return verdict

    def _require_requests(self, verdict: Verdict, after: int | None) -> None:
        completed = sum(entry.kind == "request" for entry in verdict.entries)
        if after is not None and completed != after:
            raise LedgerError(
                f"{self.folder} has {completed} requests, but this one began after {after}: another was completed "
                "meanwhile, from the same model; run this one again"
            )

    # Writing

    def _write(self, entries: Sequence[Entry], entry: Entry, size: int, key: LedgerKey) -> None:
        """Write `entry` at byte `size`, then head.json."""
        descriptor = os.open(self.folder / _LINES, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.ftruncate(descriptor, size)
            os.lseek(descriptor, size, os.SEEK_SET)
            rest = memoryview(entry.line())
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._write_head((*entries, entry), key)

    def _write_head(self, entries: Sequence[Entry], key: LedgerKey) -> None:
        if entries:
            count, last = len(entries), entries[-1].hash
            mac = key.mac("head", str(count), last)
            write_json(self.folder / _HEAD, {"entries": count, "hash": last, "mac": mac})

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock; a copy that cannot be written has no other writer either and is not locked."""
        if not os.access(self.folder, os.W_OK):
            yield
            return
        try:
            with FileLock(self.folder / _LOCK, timeout=_LOCK_SECONDS):
                yield
        except Timeout as error:
            raise LedgerError(
                f"another process has held {self.folder / _LOCK} for {_LOCK_SECONDS} s; end it or try later"
            ) from error


def open_ledger(folder: str | os.PathLike, key_file: str | os.PathLike | None) -> Ledger:
    """Return a ledger to append to, with the key of `read_key`; raises `LedgerError` if none is set."""
    key = read_key(key_file)
    if key is None:
        raise LedgerError(f"--ledger needs its key; pass --ledger_key_file, or set {KEY_VARIABLE}")
    return Ledger(folder, key)
