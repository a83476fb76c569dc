"""Laws of the ledger: whatever is edited, removed, reordered, cut off or written without the key is detected;
commitments reveal nothing without the key; several writers and a kill at any byte leave a ledger that verifies."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.append_entries import KEY
from helpers.paths import HELPERS, ROOT
from hf_unlearn.data.row_identity import row_hash
from hf_unlearn.deletion.ledger import Ledger
from hf_unlearn.deletion.ledger_entries import Entry
from hf_unlearn.deletion.ledger_key import KEY_VARIABLE, LedgerKey, read_key
from hf_unlearn.errors import LedgerError

OTHER = b"another key, which is long enough too"
ROWS = [{"question": f"who is {name}?", "answer": f"{name} is."} for name in ("anna", "bert", "carl")]
LINES = "ledger.jsonl"


def append_request(ledger: Ledger, rows: list[dict[str, Any]], number: int) -> Entry:
    """Append a completed request, with as little as the ledger itself needs."""
    commitment = ledger.commit(rows)
    content = {
        "request": number,
        "nonce": commitment.nonce,
        "rows": list(commitment.rows),
        "commitment": commitment.whole,
    }
    return ledger.append("request", content, after=number - 1)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """`created`, two requests, a push."""
    made = Ledger(tmp_path / "ledger", KEY)
    append_request(made, ROWS[:1], 1)
    append_request(made, ROWS[1:], 2)
    made.record_push(2, "me/model", "c0ffee")
    return made


def lines_of(ledger: Ledger) -> list[bytes]:
    return (ledger.folder / LINES).read_bytes().splitlines(keepends=True)


def write(ledger: Ledger, lines: list[bytes]) -> None:
    (ledger.folder / LINES).write_bytes(b"".join(lines))


def rehashed(lines: list[bytes], key: bytes | None = None) -> list[bytes]:
    """The chain as a forger makes it: all hashes right again, MACs under `key`, or left as they were."""
    previous, made = "0" * 64, []
    for line in lines:
        entry = replace(Entry(**json.loads(line)), previous=previous)
        if key is not None:
            entry = replace(entry, mac=LedgerKey(key).mac("entry", entry.digest("mac", "hash")))
        entry = replace(entry, hash=entry.digest("hash"))
        previous = entry.hash
        made.append(entry.line())
    return made


def rewrite_head(ledger: Ledger, lines: list[bytes], key: bytes | None = None) -> None:
    last = json.loads(lines[-1])["hash"]
    mac = LedgerKey(key).mac("head", str(len(lines)), last) if key else "0" * 64
    (ledger.folder / "head.json").write_text(json.dumps({"entries": len(lines), "hash": last, "mac": mac}))


def edited(line: bytes) -> bytes:
    entry = json.loads(line)
    entry["time"] = "2020-01-01T00:00:00+00:00"
    return json.dumps(entry, sort_keys=True, separators=(",", ":")).encode() + b"\n"


# Content


def test_an_intact_ledger_verifies_with_and_without_the_key(ledger: Ledger) -> None:
    for key in (KEY, None):
        verdict = Ledger(ledger.folder, key).verify()
        assert verdict.intact and not verdict.notes and verdict.keyed == (key is not None)
        assert [entry.kind for entry in verdict.entries] == ["created", "request", "request", "push"]
        assert verdict.head == verdict.entries[-1].hash
    assert [e.content["request"] for e in ledger.requests()] == [1, 2]
    assert [path.name for path in ledger.folder.iterdir() if path.name != "lock"].sort() is None
    assert {path.name for path in ledger.folder.iterdir()} <= {LINES, "head.json", "lock"}


def test_hashes_and_macs_equal_those_of_a_twin_from_the_standard(ledger: Ledger) -> None:
    """RFC 2104 by hand, SHA-256 over sorted JSON."""

    def twin(message: bytes) -> str:
        block = KEY.ljust(64, b"\0")
        inner = hashlib.sha256(bytes(b ^ 0x36 for b in block) + message).digest()
        return hashlib.sha256(bytes(b ^ 0x5C for b in block) + inner).hexdigest()

    previous = "0" * 64
    for index, line in enumerate(lines_of(ledger)):
        entry = json.loads(line)
        body = {name: entry[name] for name in ("index", "time", "kind", "content", "previous")}
        digest = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        assert entry["mac"] == twin(b"hf_unlearn ledger 1\nentry\n" + digest.encode())
        body["mac"] = entry["mac"]
        digest = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
        assert (entry["index"], entry["previous"], entry["hash"]) == (index, previous, digest)
        previous = digest
    first = ledger.requests()[0].content
    (tag,) = first["rows"]
    assert tag == twin(f"hf_unlearn ledger 1\nrow\n{first['nonce']}\n{row_hash(ROWS[0]).hex()}".encode())


def test_a_row_is_found_in_its_request_and_in_no_other(ledger: Ledger) -> None:
    assert [e.content["request"] for e in ledger.prove(ROWS[0])] == [1]
    assert [e.content["request"] for e in ledger.prove(ROWS[2])] == [2]
    assert ledger.prove(ROWS[0] | {"answer": "anna is"}) == []
    assert ledger.holds(ledger.requests()[1], [ROWS[2], ROWS[1]]) and not ledger.holds(ledger.requests()[1], ROWS)


def test_no_file_has_a_row_the_key_or_an_unkeyed_hash_of_either(ledger: Ledger) -> None:
    text = "".join(path.read_text() for path in ledger.folder.iterdir() if path.is_file())
    secret = [KEY.decode(), KEY.hex(), hashlib.sha256(KEY).hexdigest()]
    for row in ROWS:
        secret += [*row.values(), row_hash(row).hex()]
        secret += [hashlib.sha256(value.encode()).hexdigest() for value in row.values()]
    assert not [found for found in secret if found in text]
    assert ledger.requests()[0].content["rows"][0] in text  # the search finds what is there


def test_equal_rows_of_two_requests_cannot_be_linked_without_the_key(ledger: Ledger) -> None:
    again = ledger.commit(ROWS[1:])
    before = ledger.requests()[1].content
    assert not set(again.rows) & set(before["rows"]) and again.whole != before["commitment"]
    assert Ledger("none", OTHER).commit(ROWS[:1]).rows != ledger.commit(ROWS[:1]).rows
    assert list(again.rows) == sorted(again.rows)  # the order in the data set is not revealed


def test_a_row_is_the_same_from_a_file_a_data_set_or_a_tensor() -> None:
    plain = {"messages": [{"role": "user", "content": "hello"}], "n": 3, "x": [0.5, 0.25]}
    as_columns = {"x": [0.5, 0.25], "n": 3, "messages": [{"content": "hello", "role": "user"}], "other": None}
    assert row_hash(plain) == row_hash(json.loads(json.dumps(plain))) == row_hash(as_columns)
    assert row_hash(plain | {"n": 4}) != row_hash(plain)
    image = np.linspace(0, 1, 4, dtype=np.float32)
    assert row_hash({"pixel_values": torch.from_numpy(image)}) == row_hash({"pixel_values": image.tolist()})


# Tampering


def test_every_single_edited_byte_is_found(ledger: Ledger) -> None:
    """With the key and without, wherever it is; flipping nothing is the control."""
    raw = (ledger.folder / LINES).read_bytes()
    places = sorted({*range(0, len(raw) - 1, 37), *(i for i, byte in enumerate(raw[:-1]) if byte == 10)})
    for place in places:
        (ledger.folder / LINES).write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        assert not Ledger(ledger.folder).verify().intact, place
    (ledger.folder / LINES).write_bytes(raw)
    assert Ledger(ledger.folder).verify().intact


CHANGES: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "edited": lambda lines: [*lines[:1], edited(lines[1]), *lines[2:]],
    "reformatted": lambda lines: [*lines[:1], json.dumps(json.loads(lines[1])).encode() + b"\n", *lines[2:]],
    "removed": lambda lines: [lines[0], *lines[2:]],
    "reordered": lambda lines: [lines[0], lines[2], lines[1], *lines[3:]],
    "doubled": lambda lines: [*lines, lines[-1]],
    "without a beginning": lambda lines: lines[1:],
    "cut by one": lambda lines: lines[:-1],
    "cut by two": lambda lines: lines[:-2],
    "emptied": lambda lines: [],
    "removed, chain mended": lambda lines: rehashed(
        [replace_index(line, i) for i, line in enumerate(lines[:1])]
        + [replace_index(line, i + 1) for i, line in enumerate(lines[2:])]
    ),
    "edited, chain mended": lambda lines: rehashed([*lines[:1], edited(lines[1]), *lines[2:]]),
}


def replace_index(line: bytes, index: int) -> bytes:
    return replace(Entry(**json.loads(line)), index=index).line()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("key", [KEY, None], ids=["with key", "without"])
def test_a_changed_ledger_is_found_and_nothing_is_appended_to_it(
    change: str, key: bytes | None, ledger: Ledger
) -> None:
    write(ledger, CHANGES[change](lines_of(ledger)))
    verdict = Ledger(ledger.folder, key).verify()
    assert not verdict.intact, change
    for action in (ledger.requests, lambda: ledger.prove(ROWS[0]), lambda: append_request(ledger, ROWS[:1], 3)):
        with pytest.raises(LedgerError, match="cannot be trusted"):
            action()


@pytest.mark.parametrize("change", ["edited, chain mended", "removed, chain mended", "cut by one"])
def test_only_the_key_detects_a_chain_that_a_forger_repaired(change: str, ledger: Ledger) -> None:
    """The limit: anyone can make the chain and head.json again, but not the MACs."""
    lines = CHANGES[change](lines_of(ledger))
    write(ledger, lines)
    rewrite_head(ledger, lines)
    assert Ledger(ledger.folder).verify().intact
    assert not Ledger(ledger.folder, KEY).verify().intact
    write(ledger, lines)
    rewrite_head(ledger, lines, OTHER)
    assert not Ledger(ledger.folder, KEY).verify().intact


def test_a_forged_entry_at_the_end_is_found_with_the_key(ledger: Ledger) -> None:
    lines = lines_of(ledger)
    last = Entry(**json.loads(lines[-1]))
    forged = replace(last, index=4, previous=last.hash, content={"request": 9})
    for key in (OTHER, None):
        mac = LedgerKey(key).mac("entry", forged.digest("mac", "hash")) if key else last.mac
        entry = replace(forged, mac=mac)
        write(ledger, [*lines, replace(entry, hash=entry.digest("hash")).line()])
        assert Ledger(ledger.folder).verify().intact  # the limit: head.json may be one entry behind
        assert ledger.verify().problems[0] == "line 5: was written without the key: its MAC is wrong"


def test_a_ledger_rewritten_under_another_key_is_detected(ledger: Ledger) -> None:
    shutil.rmtree(ledger.folder)
    append_request(Ledger(ledger.folder, OTHER), ROWS[:1], 1)
    assert "another key" in ledger.verify().problems[0]
    with pytest.raises(LedgerError, match="another key"):
        ledger.prove(ROWS[0])


def test_only_an_anchor_kept_elsewhere_detects_an_older_state_of_the_folder(ledger: Ledger) -> None:
    lines, head = lines_of(ledger), (ledger.folder / "head.json").read_bytes()
    newer = append_request(ledger, [{"text": "later"}], 3)
    anchors = [newer.hash, newer.content["commitment"]]
    assert ledger.verify(anchors).intact
    write(ledger, lines)
    (ledger.folder / "head.json").write_bytes(head)
    assert ledger.verify().intact  # the limit that the docstring states
    for anchor in anchors:
        assert not ledger.verify([anchor]).intact


@pytest.mark.parametrize("content", [None, "{", "{}", '{"entries": "x", "hash": "", "mac": ""}', "[]"])
def test_a_missing_or_damaged_head_is_found(content: str | None, ledger: Ledger) -> None:
    path = ledger.folder / "head.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    for key in (KEY, None):
        assert not Ledger(ledger.folder, key).verify().intact


def test_a_malformed_first_line_is_damage_and_not_a_crash(ledger: Ledger) -> None:
    for line in (b"[]", b"3", b'{"index": 0}', b"\xff\xfe", b"", b"[" * 100_000):
        write(ledger, [line + b"\n", *lines_of(ledger)[1:]])
        assert not ledger.verify().intact
    first = Entry(0, "", "created", [], "0" * 64)  # type: ignore[arg-type]
    write(ledger, [replace(first, hash=first.digest("hash")).line()])
    assert not ledger.verify().intact


# Keys


@pytest.mark.parametrize("key", [b"", b"short", b"x" * 31, b"a" * 64, b"ab" * 32])
def test_a_short_or_repetitive_key_is_refused(key: bytes, tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match=f"{len(key)} bytes"):
        Ledger(tmp_path, key)


def test_the_key_comes_from_a_file_or_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert read_key(None) is None
    monkeypatch.setenv(KEY_VARIABLE, KEY.decode())
    (tmp_path / "key").write_bytes(OTHER + b"\n")
    assert read_key(None) == KEY and read_key(tmp_path / "key") == OTHER
    (tmp_path / "key").write_bytes(b"\n")
    for file in (tmp_path / "key", tmp_path / "none", tmp_path):
        with pytest.raises(LedgerError, match="token_hex"):
            read_key(file)


def test_without_a_key_a_ledger_can_be_read_and_nothing_else(ledger: Ledger) -> None:
    reader = Ledger(ledger.folder)
    assert len(reader.requests()) == 2
    for action in (lambda: reader.append("push", {}), lambda: reader.prove(ROWS[0]), lambda: reader.commit(ROWS)):
        with pytest.raises(LedgerError, match=KEY_VARIABLE):
            action()
    with pytest.raises(LedgerError, match="has no ledger"):
        Ledger(ledger.folder / "none").verify()
    assert not (ledger.folder / "none").exists()


def test_a_push_must_belong_to_a_completed_request(ledger: Ledger) -> None:
    with pytest.raises(LedgerError, match="no request 7"):
        ledger.record_push(7, "me/model", "c0ffee")


def test_a_request_that_began_before_another_was_completed_is_refused(ledger: Ledger) -> None:
    before = lines_of(ledger)
    with pytest.raises(LedgerError, match="meanwhile"):
        append_request(ledger, ROWS, 2)
    assert lines_of(ledger) == before


# Processes


def start(folder: Path, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, str(HELPERS / "append_entries.py"), str(folder), *map(str, arguments)]
    root = str(ROOT)
    return subprocess.Popen(
        command, cwd=root, env={**os.environ, "PYTHONPATH": root}, stdout=subprocess.PIPE, text=True
    )


def test_two_processes_append_at_once_and_nothing_is_lost(tmp_path: Path) -> None:
    writers = [start(tmp_path, name, 25) for name in ("a", "b")]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    verdict = Ledger(tmp_path, KEY).verify()
    assert verdict.intact and not verdict.notes and len(verdict.entries) == 51
    for name in ("a", "b"):
        assert [e.content["number"] for e in verdict.entries if e.content.get("by") == name] == list(range(25))


def test_without_the_lock_an_entry_of_two_writers_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: what one writer does between another's reading and writing is lost."""
    ledger, other = Ledger(tmp_path, KEY), Ledger(tmp_path, KEY)
    ledger.append("push", {"by": "a"})
    plain, found = Ledger._examine, []

    def examine(self: Ledger) -> Any:
        verdict = plain(self)
        if self is ledger and not found:
            found.append(1)
            other.append("push", {"by": "b"})
        return verdict

    monkeypatch.setattr(Ledger, "_examine", examine)
    monkeypatch.setattr(Ledger, "_locked", lambda self: nullcontext())
    ledger.append("push", {"by": "a"})
    assert [entry.content.get("by") for entry in ledger.entries()] == [None, "a", "a"]


@pytest.mark.parametrize("count", [1, 2], ids=["first entry", "second"])
@pytest.mark.parametrize("written", [0, 1, 150, -1])
def test_a_writer_killed_in_mid_append_leaves_a_ledger_that_verifies(written: int, count: int, tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    Ledger(folder, KEY).append("push", {"by": "before"})
    before = len(Ledger(folder).entries())
    writer = start(folder, "killed", count, written)
    assert writer.wait(60) == -signal.SIGKILL
    for key in (KEY, None):
        verdict = Ledger(folder, key).verify()
        assert verdict.intact and bool(verdict.notes) == (written != 0)
        assert len(verdict.entries) == before + count - 1 + (written == -1)
    Ledger(folder, KEY).append("push", {"by": "after"})
    verdict = Ledger(folder, KEY).verify()
    assert verdict.intact and not verdict.notes
    last = verdict.entries[-1].content
    assert last == {"by": "after"} | ({"torn_append_removed": True} if written > 0 else {})


def test_kills_at_any_moment_lose_nothing_that_was_acknowledged(tmp_path: Path) -> None:
    acknowledged = 0
    for attempt in range(4):
        writer = start(tmp_path, f"writer {attempt}", 10_000)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(0.02 + 0.03 * attempt)
        writer.kill()
        rest = writer.stdout.read().splitlines()
        writer.wait(60)
        acknowledged += 1 + len([line for line in rest if line])
        verdict = Ledger(tmp_path, KEY).verify()
        assert verdict.intact
        assert len(verdict.entries) - 1 in range(acknowledged, acknowledged + attempt + 2)


def test_a_ledger_killed_at_its_first_entry_accepts_the_next_one(tmp_path: Path) -> None:
    for written in (40, -1):
        folder = tmp_path / str(written)
        assert start(folder, "killed", 1, written).wait(60) == -signal.SIGKILL
        Ledger(folder, KEY).append("push", {"by": "after"})
        assert Ledger(folder, KEY).verify().intact
        assert [e.kind for e in Ledger(folder).entries()] == ["created", "push"]


def test_a_copy_that_cannot_be_written_can_be_verified(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    (ledger.folder / "lock").unlink(missing_ok=True)
    monkeypatch.setattr("hf_unlearn.deletion.ledger.os.access", lambda path, mode: False)
    assert ledger.verify().intact and not (ledger.folder / "lock").exists()
    before = lines_of(ledger)
    with pytest.raises(LedgerError, match="cannot be written"):
        append_request(ledger, ROWS, 3)
    with pytest.raises(LedgerError, match="cannot make"):
        Ledger(ledger.folder / LINES / "inside", KEY).append("push", {})
    assert lines_of(ledger) == before


def test_a_lock_held_for_long_is_one_line(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock

    monkeypatch.setattr("hf_unlearn.deletion.ledger._LOCK_SECONDS", 0.05)
    with FileLock(ledger.folder / "lock"), pytest.raises(LedgerError, match="another process has held"):
        ledger.append("push", {})
    assert ledger.append("push", {}).kind == "push"
