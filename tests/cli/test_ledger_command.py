"""Laws of `--ledger` and `hf-unlearn ledger`: a series of requests is recorded, shown, verified and searched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.command_lines import FINISHED, answered, refused, run_line
from hf_unlearn.cli import main
from hf_unlearn.cli.answers import NO
from hf_unlearn.deletion.ledger_key import KEY_VARIABLE
from hf_unlearn.evaluation.report import UnlearningReport


def test_a_series_of_requests_and_its_ledger_take_flags_alone(
    places: dict[str, str], tmp_path: Path, key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each request starts from the last model, earlier rows are tested again, and the ledger has exactly these rows."""
    flags = {"ledger": str(tmp_path / "ledger"), "ledger_key_file": str(key), "eval_splits": "full[6:7]"}
    forget, reports = ["full[0:2]", "full[2:3]", "full[4:5]"], []
    for number, split in enumerate(forget):
        more = {"forget": split, "output_dir": str(tmp_path / f"out-{number}"), "energy_step": "0.02"}
        more |= {"constraint_settings": '{"energy": 0.8}', "max_retain_drift": "9"}
        content = answered(run_line(places, tmp_path, **flags, **more), capsys)
        reports.append(content["reports"]["energy_ridge"])
        assert reports[-1] == UnlearningReport.load(tmp_path / f"out-{number}").content()
    assert [r["request"]["number"] for r in reports] == [1, 2, 3]
    assert [r["method"]["constraint_settings"]["energy"] for r in reports] == pytest.approx([0.8, 0.82, 0.84])
    assert [r["method"]["statistics"]["rows"] for r in reports] == [4, 3, 2]
    left = [r["settings"]["max_retain_drift"] for r in reports]
    assert left == pytest.approx([9.0, *(9 - r["series"]["drift_used"]["relative"] for r in reports[:2])])
    last = {(m["split"], m["model"]): m for m in reports[2]["metrics"] if m["name"] == "loss"}
    assert {split: last[split, "unlearned"]["n"] for split in ("forgotten_1", "forgotten_2", "forget", "retain")} == {
        "forgotten_1": 2,
        "forgotten_2": 1,
        "forget": 1,
        "retain": 2,
    }
    after = {m["split"]: m["value"] for m in reports[1]["metrics"] if (m["name"], m["model"]) == ("loss", "unlearned")}
    assert last["forgotten_2", "original"]["value"] == pytest.approx(
        after["forget"], rel=1e-5
    )  # the third request started from there

    ledger = ["--ledger", str(tmp_path / "ledger")]
    keyed = [*ledger, "--ledger_key_file", str(key)]
    assert answered(["ledger", "verify", *keyed], capsys)["intact"] and main(["ledger", "show", *ledger]) == 0
    shown = capsys.readouterr().out
    assert shown.count("data full[") == 3 and "energy" in shown
    rows = (Path(places["data"]) / "full.json").read_text().splitlines()
    for index, number in ((0, 1), (1, 1), (2, 2), (4, 3)):
        assert [f["request"] for f in answered(["ledger", "prove", rows[index], *keyed], capsys)["found"]] == [number]
    assert answered(["ledger", "prove", f"{places['data']}/full.json:5", *keyed], capsys)["found"][0]["request"] == 3
    for row in (rows[3], rows[8], json.dumps(json.loads(rows[0]) | {"completion": "no"})):
        assert answered(["ledger", "prove", row, *keyed], capsys, NO) == {"found": []}
    assert KEY_VARIABLE in refused(["ledger", "prove", rows[0], *ledger], capsys)
    anchor = reports[1]["request"]["commitment"]
    assert main(["ledger", "verify", *ledger, "--anchor", anchor]) == 0
    assert "without the key" in capsys.readouterr().out
    assert main(["ledger", "verify", *keyed, "--anchor", anchor[::-1]]) == NO
    assert "damaged" in capsys.readouterr().out
    one_more = run_line(places, tmp_path, **flags, forget="full[5:6]", output_dir=str(tmp_path / "text"))
    assert main([*one_more, "--max_retain_drift", "9"]) in FINISHED
    text = capsys.readouterr().out
    assert "request 4 of its ledger: room " in text and " of 9.0000, commitment " in text
    again = run_line(places, tmp_path, **flags, forget="full[1:2]", output_dir=str(tmp_path / "again"))
    assert "already in request 1" in refused(again, capsys)
    spent = run_line(places, tmp_path, **flags, forget="full[3:4]", max_retain_drift="1e-9")
    assert "nothing is left" in refused(spent, capsys)
    path = tmp_path / "ledger" / "ledger.jsonl"
    path.write_text(path.read_text().replace("full[0:2]", "full[0:3]"))
    assert main(["ledger", "verify", *ledger]) == NO and main(["ledger", "show", *ledger]) == NO
    assert "cannot be trusted" in refused(["ledger", "prove", rows[0], *keyed], capsys)


def test_a_series_continues_with_a_moved_model_and_new_statistics(
    places: dict[str, str], tmp_path: Path, key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"ledger": str(tmp_path / "ledger"), "ledger_key_file": str(key)}
    assert main(run_line(places, tmp_path, **flags)) in FINISHED
    (tmp_path / "out").rename(tmp_path / "moved")
    more = {**flags, "forget": "full[2:4]", "output_dir": str(tmp_path / "next")}
    assert "start from that model" in refused(run_line(places, tmp_path, **more), capsys)
    more["model_name_or_path"] = str(tmp_path / "moved")
    assert "other weights" in refused(run_line(places, tmp_path, **more, statistics=places["stale"]), capsys)
    collected = ["--model_name_or_path", str(tmp_path / "moved"), "--dataset_name", places["data"]]
    assert main(["collect", *collected, "--rows", "full[2:6]", "--output_dir", str(tmp_path / "fresh")]) == 0
    capsys.readouterr()
    report = answered(run_line(places, tmp_path, **more, statistics=str(tmp_path / "fresh")), capsys)["reports"][
        "energy_ridge"
    ]
    assert report["series"]["statistics_carried_from"] == [] and report["method"]["statistics"]["rows"] == 2


@pytest.mark.parametrize("row", ["[1]", "{", "full.json:1", "nowhere", "{}", "full.json:0", "full.json:x"])
def test_a_malformed_row_is_refused(row: str, tmp_path: Path, key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--ledger", str(tmp_path), "--ledger_key_file", str(key)]
    assert "row" in refused(["ledger", "prove", row, *flags], capsys)
    assert "prove needs one row" in refused(["ledger", "prove", *flags], capsys)
    assert "prove needs one row" in refused(["ledger", "show", "{}", *flags], capsys)
    assert "has no ledger" in refused(["ledger", "show", *flags], capsys)
