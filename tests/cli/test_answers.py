"""Laws of answers: finished commands print a table, or with `--json` one JSON document and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.command_lines import FINISHED, answered, run_line
from hf_unlearn import __version__
from hf_unlearn.cli import main
from hf_unlearn.evaluation.report import UnlearningReport


def test_a_run_exits_with_0_and_its_folder_can_be_evaluated(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(run_line(places, tmp_path)) in FINISHED
    out = capsys.readouterr().out
    assert "answer_probability by split (forgotten: 2 rows" in out and str(tmp_path / "out") in out
    assert (tmp_path / "out" / "model.safetensors").is_file()
    argv = ["evaluate", "--model_name_or_path", str(tmp_path / "out"), "--dataset_name", places["data"]]
    argv += ["--forget", "full[0:2]", "--original", places["model"], "--output_dir", str(tmp_path / "judged")]
    assert main(argv) == 0
    assert "answer_probability" in capsys.readouterr().out
    assert (tmp_path / "judged" / "unlearning_report.json").is_file()


def test_a_finished_model_is_audited_and_its_card_says_so(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(run_line(places, tmp_path)) in FINISHED
    folder = tmp_path / "out"
    weights = (folder / "model.safetensors").read_bytes()
    argv = ["audit", str(folder), "--dataset_name", places["data"], "--forget", "full[0:3]", "--holdout", "full[6:9]"]
    argv += ["--retrained", places["model"], "--relearn_steps", "1", "--max_length", "64"]
    argv += ["--attacks", "membership,relearning,quantisation,recalibration"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "quantised_4_bit_probability" in out and "verdict: relearned_probability: " in out
    assert "not run: recalibration: the model has no batch norm" in out
    assert not UnlearningReport.load(folder).audit  # nothing is written without --update_model
    assert main([*argv, "--update_model", "True"]) == 0
    report, card = UnlearningReport.load(folder), (folder / "README.md").read_text()
    assert report.audit["verdicts"] and report.get("answer_probability", "forget") is not None
    assert "quantised" in card and "relearned" in card
    assert (folder / "model.safetensors").read_bytes() == weights
    template = tmp_path / "own.md"
    template.write_text("---\n{{ card_data }}\n---\n\nOur words on {{ model_name }}.\n")
    assert main([*argv, "--update_model", "True", "--card_template", str(template)]) == 0
    assert "Our words on out." in (folder / "README.md").read_text()
    assert main([*argv, "--card_template", str(tmp_path / "missing.md")]) == 2
    assert "missing.md" in capsys.readouterr().err
    assert main([*argv, "--attacks", "no"]) == 2
    assert "unknown attack 'no'" in capsys.readouterr().err


def test_json_is_one_document_for_anything_that_the_libraries_print(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The Trainer's own prints are on."""
    content = answered(run_line(places, tmp_path, disable_tqdm="False", forget_target="1e-9"), capsys)
    assert content["output_dir"] == str(tmp_path / "out")
    assert content["reports"]["energy_ridge"] == json.loads((tmp_path / "out" / "unlearning_report.json").read_text())
    common = ["--model_name_or_path", places["model"], "--dataset_name", places["data"]]
    judged = answered(["evaluate", *common, "--forget", "full[0:2]"], capsys)["report"]
    assert {m["model"] for m in judged["metrics"]} == {"unlearned"}
    collected = answered(["collect", *common, "--rows", "full", "--output_dir", str(tmp_path / "s")], capsys)
    assert collected["rows"] == 9 and not collected["fisher"]
    options = ["--sketch_above", "40", "--sketch_rank", "8", "--tolerance", "0.99"]
    line = ["collect", *common, "--rows", "full", *options, "--output_dir", str(tmp_path / "sketched")]
    settings = answered(line, capsys)["settings"]
    assert [settings[name] for name in ("sketch_above", "sketch_rank", "tolerance")] == [40, 8, 0.99]
    assert settings["change"] <= 0.99
    assert answered(["env"], capsys)["hf-unlearn"] == __version__
    assert "unknown constraint" in answered(["demo", "--constraint", "hope"], capsys, 2)["error"]
    assert "no such command" not in answered(["completion", "bash"], capsys)["script"]


def test_json_of_a_separate_process_is_alone_on_standard_output(places: dict[str, str], tmp_path: Path) -> None:
    request = run_line(places, tmp_path, disable_tqdm="False", forget_target="1e-9")
    line = [sys.executable, "-m", "hf_unlearn", *request, "--json"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode in FINISHED, done.stderr
    assert json.loads(done.stdout)["reports"]["energy_ridge"]["method"]["steps"] == 1
    assert done.stderr  # with the progress bars


def test_env_prints_versions_and_no_paths(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert f"- hf-unlearn: {__version__}" in text and "- torch: " in text and "- devices: " in text
    assert str(Path.home()) not in text and "/" not in text.replace("platform", "")
