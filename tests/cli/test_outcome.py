"""Laws of the outcome on the command line: table, JSON and exit code agree, and no miss reads as a success."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.command_lines import answered, run_line
from hf_unlearn.cli import main
from hf_unlearn.evaluation.report import UnlearningReport

CASES: dict[str, tuple[int, dict[str, str]]] = {
    "missed": (4, {"forget_target": "1e-9", "learning_rate": "1e-7"}),
    "nothing to forget": (5, {"forget_target": "1.0"}),
    "reached": (0, {"forget_target": "4", "forget_metric": "loss", "learning_rate": "0.2", "loss": "grad_ascent"}),
}


@pytest.mark.parametrize("status", CASES)
def test_exit_code_and_json_name_the_outcome(
    status: str, places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, changes = CASES[status]
    answer = answered(run_line(places, tmp_path, max_steps="8", eval_strategy="steps", **changes), capsys, code)
    assert answer["outcome"]["status"] == status and answer["outcome"]["constraint"] == "energy_ridge"
    report = UnlearningReport.load(tmp_path / "out")
    assert report.outcome["status"] == status
    assert report.outcome["summary"].partition(":")[0] in (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_worst_of_several_constraints_counts(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = run_line(places, tmp_path, constraints="ridge,none", forget_target="1e-9", learning_rate="1e-7")
    capsys.readouterr()
    assert main(line) == 4
    assert capsys.readouterr().out.count("outcome: missed by") == 2


def test_the_general_help_documents_the_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "4 the run ended and its mark was missed" in text and "5 there was nothing" in text
