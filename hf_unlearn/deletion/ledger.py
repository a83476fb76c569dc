"""`Ledger`: the append-only record of deletion requests, that names no row to whoever has no key.

A ledger is a folder:

    ledger.jsonl  one entry a line, each with the hash of the one before (a hash chain) and a MAC under the key
    head.json     number of entries and hash of the last one, replaced after each append
    lock          held while reading or appending
    _private/     what the next request needs (`series`); never published

Rows appear only as HMAC-SHA256 (RFC 2104) of their content under the key and a nonce of the request: who lacks the
key can neither test a guess nor see that two requests have a row in common. The key is in no file of the ledger.

What `verify` detects: with or without the key any edited, removed, inserted or reordered entry, and entries missing at
the end (head.json counts them). With the key also entries, heads and whole ledgers that somebody wrote without it.
What nothing in the folder can show: that all of it was put back to an older state, or that whoever has the key wrote a
new history. Against both, keep an entry's hash or a commitment elsewhere, such as on a published model card, and have
it looked for (`verify --anchor`). Times are the writer's clock. A commitment says what was asked, not what came of it.
"""

import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hf_unlearn.core.files import write_json
from hf_unlearn.data.formats import Row
from hf_unlearn.data.row_identity import row_hash
from hf_unlearn.errors import LedgerError

FORMAT_VERSION = 1
KEY_VARIABLE = "HF_UNLEARN_LEDGER_KEY"
KEY_BYTES = 32
_LINES, _HEAD, _LOCK, _LOCK_SECONDS = "ledger.jsonl", "head.json", "lock", 60
_START = "0" * 64


@dataclass(frozen=True)
class Entry:
    """One line.

    Attributes:
        index: Place in the ledger, from 0.
        time: UTC, ISO 8601.
        kind: `created` (the first), `request` (a completed one), `push`.
        content: What `series.RequestSeries.complete` and `Ledger.record_push` put there.
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
        return _canonical(asdict(self)) + b"\n"

    def digest(self, *without: str) -> str:
        """SHA-256 of the entry without some of its fields."""
        return hashlib.sha256(_canonical({k: v for k, v in asdict(self).items() if k not in without})).hexdigest()


@dataclass(frozen=True)
class Commitment:
    """A set of rows without the rows: `rows` are sorted, `whole` stands for all of them (the card shows it)."""

    nonce: str
    rows: tuple[str, ...]
    whole: str


@dataclass(frozen=True)
class Verdict:
    """What `Ledger.verify` found: `problems` are damage, `notes` are traces of a crash that the next append mends."""

    entries: tuple[Entry, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    keyed: bool
    size: int
    """Bytes of complete entries; what follows them is a torn append."""
    behind: bool
    """head.json does not know of the last entry yet."""

    @property
    def intact(self) -> bool:
        return not self.problems

    @property
    def head(self) -> str:
        """Hash of the last entry: the one value to keep elsewhere."""
        return self.entries[-1].hash if self.entries else _START


class Ledger:
    """The ledger in `folder`; with a `key` it can append, check MACs and find rows.

    Any number of processes may append at once: each holds a file lock, reads the ledger again and verifies it before it
    writes. A process killed at any moment leaves a ledger that verifies; a torn last line, which nobody was told of as
    written, is cut off by the next append, and that says so.

    Raises:
        LedgerError: The key is too short.
    """

    def __init__(self, folder: str | os.PathLike, key: bytes | None = None):
        self.folder, self._key = Path(folder), key
        if key is not None and (len(key) < KEY_BYTES or len(set(key)) < KEY_BYTES // 4):
            raise LedgerError(
                f"the ledger key has {len(key)} bytes, {len(set(key))} of them different; it must be at least "
                f"{KEY_BYTES} random ones, such as: {_MAKE_KEY}"
            )

    def exists(self) -> bool:
        return (self.folder / _LINES).is_file()

    def verify(self, anchors: Iterable[str] = ()) -> Verdict:
        """Read and check everything; damage is in the verdict, not raised.

        Args:
            anchors: Hashes of entries or commitments of requests, kept elsewhere, that the ledger must have.

        Raises:
            LedgerError: There is no ledger.
        """
        if not self.exists():
            raise LedgerError(f"there is no ledger in {self.folder}; `hf-unlearn run --ledger` makes one")
        with self._locked():
            verdict = self._examine()
        known = {e.hash for e in verdict.entries} | {e.content.get("commitment") for e in verdict.entries}
        missing = tuple(f"no entry or request has {anchor}" for anchor in anchors if anchor not in known)
        return replace(verdict, problems=verdict.problems + missing)

    def entries(self) -> tuple[Entry, ...]:
        """All entries, none before the first append; raises `LedgerError` where the ledger is damaged."""
        return self._sound(self.verify()).entries if self.exists() else ()

    def requests(self) -> list[Entry]:
        """The completed requests, oldest first."""
        return [entry for entry in self.entries() if entry.kind == "request"]

    def append(self, kind: str, content: Mapping[str, Any], after: int | None = None) -> Entry:
        """Add an entry, and make the ledger at the first.

        Args:
            kind: See `Entry`.
            content: Whatever JSON can hold; no row, text or id.
            after: Number of requests that there must be: no other was completed meanwhile.

        Raises:
            LedgerError: No key or a wrong one, a damaged ledger, another request meanwhile, or a lock held for long.
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
            found = self._sound(self._examine())
            done = sum(entry.kind == "request" for entry in found.entries)
            if after is not None and done != after:
                raise LedgerError(
                    f"{self.folder} has {done} requests, and this one began after {after}: another was completed "
                    "meanwhile, from the same model; run this one again"
                )
            if found.behind:  # so that head.json is never more than one entry behind
                self._write_head(found.entries)
            entries = found.entries
            if not entries:
                made = {"format_version": FORMAT_VERSION, "key_check": self._mac("key check")}
                entries = self._write(entries, "created", made, found.size)
                found = self._examine()
            if found.notes and "torn" in found.notes[-1]:
                content = {**content, "torn_append_removed": True}
            return self._write(entries, kind, content, found.size)[-1]

    def commit(self, rows: Iterable[Row]) -> Commitment:
        """Commit to rows as users have them, under a fresh nonce; equal rows count once."""
        nonce = secrets.token_hex(16)
        tags = tuple(sorted({self.tag(nonce, row) for row in rows}))
        return Commitment(nonce, tags, self._mac("request", nonce, *tags))

    def holds(self, entry: Entry, rows: Iterable[Row]) -> bool:
        """Whether a request was about exactly these rows."""
        return sorted({self.tag(entry.content["nonce"], row) for row in rows}) == entry.content["rows"]

    def prove(self, row: Row) -> list[Entry]:
        """The completed requests that a row was in; raises `LedgerError` without the ledger's key."""
        requests = self.requests()
        return [entry for entry in requests if self.tag(entry.content["nonce"], row) in entry.content["rows"]]

    def record_push(self, request: int, repo_id: str, commit: str) -> Entry:
        """Note, once it is known, the Hub commit that published the model of request number `request`."""
        if request not in [entry.content["request"] for entry in self.requests()]:
            raise LedgerError(f"{self.folder} has no request {request}; `hf-unlearn ledger show` lists them")
        return self.append("push", {"request": request, "repo_id": repo_id, "commit": commit})

    # Reading

    def _examine(self) -> Verdict:
        """Everything but the anchors; the caller holds the lock."""
        raw = (self.folder / _LINES).read_bytes() if self.exists() else b""
        *lines, torn = raw.split(b"\n")
        entries: list[Entry] = []
        problems: list[str] = []
        for index, line in enumerate(lines):
            entry, problem = self._read(line, index, entries[-1].hash if entries else _START)
            if entry is None:
                problems.append(f"line {index + 1}: {problem}")
                break  # what follows hangs on it
            entries.append(entry)
        counted, problem = self._check_head(entries, complete=not problems)
        if problem:
            problems.append(problem)
        notes = []
        if behind := not problems and counted < len(entries):
            notes.append(f"entry {len(entries) - 1} was written, and its writer killed before head.json")
        if torn:
            notes.append(f"the last line is torn ({len(torn)} bytes): a killed append, cut off by the next one")
        keyed = self._key is not None
        return Verdict(
            tuple(entries), tuple(problems), tuple(notes), keyed, len(raw) - len(torn), behind or not entries
        )

    def _read(self, line: bytes, index: int, previous: str) -> tuple[Entry | None, str]:
        """The entry on a line, or None and what is wrong with it."""
        try:
            content = json.loads(line)
            entry = Entry(**content)
        except (ValueError, TypeError, RecursionError):
            return None, "is no entry"
        if not isinstance(content["content"], dict):
            return None, "is no entry"
        if entry.line() != line + b"\n" or entry.digest("hash") != entry.hash:
            return None, "was edited: its hash is another's"
        if entry.index != index or entry.previous != previous:
            return None, "does not follow the line before: entries were removed, inserted or reordered"
        if index == 0 and (entry.kind != "created" or entry.content.get("format_version", 0) > FORMAT_VERSION):
            return None, f"is no beginning of a ledger of format {FORMAT_VERSION}"
        if self._key is not None:
            if index == 0 and not _same(entry.content.get("key_check"), self._mac("key check")):
                return None, "the ledger was made with another key"
            if not _same(entry.mac, self._mac("entry", entry.digest("mac", "hash"))):
                return None, "was written without the key: its MAC is wrong"
        return entry, ""

    def _check_head(self, entries: list[Entry], complete: bool) -> tuple[int, str]:
        """Number of entries that head.json counts, and what is wrong with that."""
        path = self.folder / _HEAD
        if not path.is_file():
            return 0, f"{_HEAD} is missing" if len(entries) > 1 else ""
        try:
            head = json.loads(path.read_text(encoding="utf-8"))
            counted, last, mac = int(head["entries"]), str(head["hash"]), str(head["mac"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0, f"{_HEAD} cannot be read"
        if self._key is not None and not _same(mac, self._mac("head", str(counted), last)):
            return counted, f"{_HEAD} was written without the key: its MAC is wrong"
        if not complete:
            return counted, ""
        if counted > len(entries):
            return counted, f"{counted - len(entries)} entries are missing at the end: {_HEAD} counts {counted}"
        if counted < 1 or entries[counted - 1].hash != last or len(entries) - counted > 1:
            return counted, f"{_HEAD} belongs to another state of the ledger"
        return counted, ""

    def _sound(self, verdict: Verdict) -> Verdict:
        if verdict.problems:
            raise LedgerError(
                f"the ledger {self.folder} is not to be trusted: {verdict.problems[0]}; check the key, or put back a "
                "copy that `hf-unlearn ledger verify` finds intact"
            )
        return verdict

    # Writing

    def _write(self, entries: tuple[Entry, ...], kind: str, content: Mapping[str, Any], size: int) -> tuple[Entry, ...]:
        """Write one entry at byte `size`, then head.json; returns all entries."""
        time = datetime.now(timezone.utc).isoformat(timespec="seconds")
        previous = entries[-1].hash if entries else _START
        as_read = json.loads(_canonical(content))
        entry = Entry(len(entries), time, kind, as_read, previous)
        entry = replace(entry, mac=self._mac("entry", entry.digest("mac", "hash")))
        entry = replace(entry, hash=entry.digest("hash"))
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
        self._write_head((*entries, entry))
        return (*entries, entry)

    def _write_head(self, entries: tuple[Entry, ...]) -> None:
        if entries:
            count, last = len(entries), entries[-1].hash
            mac = self._mac("head", str(count), last)
            write_json(self.folder / _HEAD, {"entries": count, "hash": last, "mac": mac})

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone with the ledger; of a copy that cannot be written nobody else is a writer either."""
        if not os.access(self.folder, os.W_OK):
            yield
            return
        try:
            with FileLock(self.folder / _LOCK, timeout=_LOCK_SECONDS):
                yield
        except Timeout as error:
            raise LedgerError(
                f"{self.folder / _LOCK} has been held by another process for {_LOCK_SECONDS} s; end it or try later"
            ) from error

    # The key

    def tag(self, nonce: str, row: Row) -> str:
        """A row's commitment under the nonce of a request."""
        return self._mac("row", nonce, row_hash(row).hex())

    def _mac(self, purpose: str, *parts: str) -> str:
        """HMAC-SHA256 of parts without newlines; `purpose` keeps the uses of the key apart."""
        if self._key is None:
            raise LedgerError(f"this needs the ledger key: pass --ledger_key_file, or set {KEY_VARIABLE}")
        message = "\n".join((f"hf_unlearn ledger {FORMAT_VERSION}", purpose, *parts))
        return hmac.new(self._key, message.encode(), hashlib.sha256).hexdigest()


_MAKE_KEY = "python -c 'import secrets; print(secrets.token_hex(32))' > KEYFILE"


def read_key(file: str | os.PathLike | None) -> bytes | None:
    """The key in a file, or else in the variable `HF_UNLEARN_LEDGER_KEY`; None where there is neither.

    White space around it does not count. Raises `LedgerError` where the file cannot be read or is empty.
    """
    if file is None:
        return os.environ.get(KEY_VARIABLE, "").strip().encode() or None
    try:
        key = Path(file).read_bytes().strip()
    except OSError as error:
        raise LedgerError(f"cannot read the ledger key {file} ({error.strerror}); make one: {_MAKE_KEY}") from error
    if not key:
        raise LedgerError(f"the ledger key {file} is empty; make one: {_MAKE_KEY}")
    return key


def open_ledger(folder: str | os.PathLike, key_file: str | os.PathLike | None) -> Ledger:
    """A ledger to append to, with the key of `read_key`; raises `LedgerError` where there is none."""
    key = read_key(key_file)
    if key is None:
        raise LedgerError(f"--ledger needs its key; pass --ledger_key_file, or set {KEY_VARIABLE}")
    return Ledger(folder, key)


def _same(seen: Any, expected: str) -> bool:
    return hmac.compare_digest(str(seen).encode(), expected.encode())


def _canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
