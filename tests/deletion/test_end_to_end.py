"""One request from the first command to the last: run, push, load, audit, record. The published model equals the local
one to the bit, and no text of a forgotten row is published; with the allow-list off the same search finds them all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.commands import PEOPLE, ROWS, said, tiny_model
from helpers.hub_client import LOAD, Client
from helpers.hub_server import Hub
from hf_unlearn.evaluation.report import UnlearningReport

PERSON, REPO = "Ilvara Quennstad", "me/forgetful"
FORGET = [row for row in ROWS[:40] if row["person"] == PERSON]
COMMAND = """
from hf_unlearn.cli import main
result = main(argv)
"""
WITHOUT_THE_LIST = """
import hf_unlearn.publishing.model_folder as publish
from pathlib import Path
kept = publish.publishable
publish.publishable = lambda folder, patterns=None: kept(folder, patterns) if patterns else sorted(
    p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())
try:
    result = publish.push_unlearned_model(folder, folder, repo).oid
finally:
    publish.publishable = kept
"""


def texts_in(seen: bytes) -> Iterator[str]:
    """Texts of forget rows that are in it, as they are or as JSON writes them."""
    for text in (text for row in FORGET for text in (row["question"], row["answer"])):
        if text.encode() in seen or json.dumps(text)[1:-1].encode() in seen:
            yield text


@pytest.fixture
def ledger(tmp_path: Path) -> list[str]:
    (tmp_path / "key").write_bytes(bytes(range(32)))
    return ["--ledger", str(tmp_path / "ledger"), "--ledger_key_file", str(tmp_path / "key")]


def test_a_request_from_the_run_to_the_hub_the_audit_and_the_ledger(
    hub: Hub, client: Client, ledger: list[str], tmp_path: Path
) -> None:
    data = ["--dataset_name", str(PEOPLE), "--train", "people[0:40]", "--forget_filter", f'person == "{PERSON}"']
    data += ["--holdout", "people[100:120]", "--cache_dir", str(tmp_path / "cache")]
    out, model = tmp_path / "out", tiny_model(tmp_path / "model")
    content = said(
        [
            "run",
            *data,
            *ledger,
            "--model_name_or_path",
            str(model),
            "--output_dir",
            str(out),
            "--base_model",
            "me/base",
            "--fine_tune",
            "True",
            "--fine_tune_epochs",
            "40",
            "--fine_tune_learning_rate",
            "1e-2",
            "--max_steps",
            "100",
            "--use_cpu",
            "True",
            "--disable_tqdm",
            "True",
        ]
    )
    report = UnlearningReport.load(out)
    assert content["reports"]["energy_ridge"] == report.content() and report.request["rows"] == len(FORGET) == 20
    before, after, kept = (
        report.get("answer_probability", *where)
        for where in (("forget", "original"), ("forget", "unlearned"), ("retain", "unlearned"))
    )
    assert before and after and kept and after.value < 0.5 * before.value < kept.value

    # published
    (out / "rows.jsonl").write_text("\n".join(map(json.dumps, FORGET)))  # what somebody left next to the model
    assert client.run(COMMAND, argv=["push", str(out), REPO, *ledger, "--private"]) == 0
    for seen in (hub.everything_published(), hub.everything_received(), client.log.read_bytes()):
        assert not list(texts_in(seen))
    assert "rows.jsonl" not in hub.files(REPO)
    client.run(WITHOUT_THE_LIST, folder=str(out), repo="me/open")
    assert len(set(texts_in(hub.everything_published()))) == 2 * len(FORGET)

    # loaded, and audited from there
    ids = [list(range(1, 9)), list(range(20, 28))]
    with torch.no_grad():
        local = AutoModelForCausalLM.from_pretrained(out).eval()(torch.tensor(ids)).logits.tolist()
        other = AutoModelForCausalLM.from_pretrained(model).eval()(torch.tensor(ids)).logits.tolist()
    assert client.run(LOAD, repo=REPO, ids=ids) == local != other
    audit_command = ["audit", REPO, *data, "--attacks", "membership,relearning,quantisation", "--relearn_steps", "1"]
    assert client.run(COMMAND, argv=[*audit_command, "--output_dir", str(tmp_path / "audit")]) == 0
    audit = UnlearningReport.load(tmp_path / "audit")
    attacked = audit.get("membership_auc", "forget")
    found = report.get("membership_auc", "forget")
    assert attacked and found and attacked.value == pytest.approx(found.value) and audit.audit["verdicts"]
    assert audit.get("relearned_probability", "forget") and audit.get("quantised_4_bit_probability", "forget")

    # recorded
    verdict = said(["ledger", "verify", *ledger, "--anchor", report.request["commitment"]])
    assert verdict["intact"] and verdict["key_checked"]
    entries = said(["ledger", "show", *ledger])["entries"]
    assert [entry["kind"] for entry in entries] == ["created", "request", "push"]
    assert entries[-1]["content"]["commit"] == hub.repositories[REPO].refs["refs/heads/main"]
    assert [f["request"] for f in said(["ledger", "prove", json.dumps(FORGET[0]), *ledger])["found"]] == [1]
    said(["ledger", "prove", json.dumps(ROWS[30]), *ledger], code=3)
    for path in (path for path in (tmp_path / "ledger").rglob("*") if path.is_file()):
        assert not list(texts_in(path.read_bytes())), path
        assert PERSON.encode() not in path.read_bytes(), path
