"""`hf-unlearn ledger show | verify | prove ROW`: the record of deletion requests."""

import json
from argparse import ArgumentParser
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_unlearn.cli.answers import NO, Answer
from hf_unlearn.cli.parsers import make_parser
from hf_unlearn.core.text import align
from hf_unlearn.deletion.ledger import Ledger
from hf_unlearn.deletion.ledger_entries import Entry, Verdict
from hf_unlearn.deletion.ledger_key import KEY_VARIABLE, read_key
from hf_unlearn.errors import DataError, SettingsError


def parser() -> ArgumentParser:
    flags = make_parser(
        "ledger",
        "Show or verify the record of deletion requests, or find a row in it.",
        usage="show | verify | prove ROW --ledger FOLDER [options]",
    )
    flags.add_argument(
        "action",
        choices=("show", "verify", "prove"),
        help="show: one line for each request. verify: was it altered, or cut at the end? prove: was a row in a "
        "completed request? verify and prove exit with 3 for a no.",
    )
    flags.add_argument("row", nargs="?", help="Row to prove: a JSON object, or FILE:LINE of a file of JSON lines.")
    flags.add_argument("--ledger", required=True, metavar="FOLDER", help="Folder of the ledger.")
    flags.add_argument("--ledger_key_file", metavar="FILE", help=f"File with its key; default: {KEY_VARIABLE}.")
    flags.add_argument(
        "--anchor",
        action="append",
        default=[],
        metavar="HASH",
        help="verify: hash of an entry, or commitment of a request, kept elsewhere, that the ledger must contain.",
    )
    return flags


def main(argv: list[str]) -> Answer:
    args = parser().parse_args(argv)
    ledger = Ledger(args.ledger, read_key(args.ledger_key_file))
    if (args.row is None) == (args.action == "prove"):
        raise SettingsError("ledger: prove needs one row, show and verify take none: ledger prove ROW --ledger FOLDER")
    if args.action == "prove":
        return _prove(ledger, read_row(args.row))
    verdict = ledger.verify(args.anchor)
    return _verify(ledger, verdict) if args.action == "verify" else _show(ledger, verdict)


def read_row(text: str) -> dict[str, Any]:
    """Return a row that is given as JSON, or as `FILE:LINE` with lines from 1.

    >>> read_row('{"id": 7}')
    {'id': 7}

    Raises:
        DataError: The text is neither, or its JSON is not an object with columns.
    """
    if not text.lstrip().startswith("{"):
        file, _, line = text.rpartition(":")
        try:
            text = Path(file).read_text(encoding="utf-8").splitlines()[int(line) - 1 if int(line) > 0 else 2**62]
        except (OSError, ValueError, IndexError, OverflowError) as error:
            raise DataError(f"row {text!r} is neither a JSON object nor FILE:LINE of an existing line") from error
    try:
        row = json.loads(text)
    except ValueError as error:
        raise DataError(f"the row is not valid JSON ({error})") from error
    if not isinstance(row, dict) or not row:
        raise DataError("the row must be a JSON object with the columns of the data set")
    return row


def _prove(ledger: Ledger, row: dict[str, Any]) -> Answer:
    entries = [{"request": e.content["request"], "time": e.time, "hash": e.hash} for e in ledger.prove(row)]
    if not entries:
        return Answer("no: no completed request contains exactly this row", {"found": []}, NO)
    lines = [f"yes: in request {e['request']}, completed {e['time']} (entry {e['hash']})" for e in entries]
    return Answer("\n".join(lines), {"found": entries})


def _verify(ledger: Ledger, verdict: Verdict) -> Answer:
    lines = [f"damaged: {problem}" for problem in verdict.problems]
    lines += [f"note: {note}" for note in verdict.notes]
    if verdict.intact:
        lines.append(f"intact: {len(verdict.entries)} entries, last hash {verdict.head}")
        lines.append(
            "its key was checked"
            if verdict.keyed
            else "without the key: a ledger that somebody else rewrote completely would look the same"
        )
    content = {
        "intact": verdict.intact,
        "problems": verdict.problems,
        "notes": verdict.notes,
        "key_checked": verdict.keyed,
        "entries": len(verdict.entries),
        "head": verdict.head,
    }
    return Answer("\n".join(lines), content, 0 if verdict.intact else NO)


def _show(ledger: Ledger, verdict: Verdict) -> Answer:
    pushes: dict[int, str] = {}
    for entry in verdict.entries:
        if entry.kind == "push":
            pushes[entry.content["request"]] = f"{entry.content['repo_id']}@{entry.content['commit'][:12]}"
    rows = [["request", "completed", "rows", "source", "loss", "constraint", "weights after", "pushed"]]
    rows += [_line(entry, pushes) for entry in verdict.entries if entry.kind == "request"]
    text = align(rows) if len(rows) > 1 else "no request is completed yet"
    if not verdict.intact:
        text = f"not to be trusted: {verdict.problems[0]}\n{text}"
    content = {"intact": verdict.intact, "entries": [asdict(entry) for entry in verdict.entries]}
    return Answer(text, content, 0 if verdict.intact else NO)


def _line(entry: Entry, pushes: dict[int, str]) -> list[str]:
    content, method = entry.content, entry.content.get("method") or {}
    cells = [content.get("request"), entry.time, len(content.get("rows", ())), content.get("source")]
    cells += [method.get("loss"), method.get("constraint"), str((content.get("weights") or {}).get("after"))[:12]]
    return [*("-" if cell is None else str(cell) for cell in cells), pushes.get(content.get("request", 0), "-")]
