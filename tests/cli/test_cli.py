"""Laws of the command line: help lists every command and setting; a wrong input is one line on standard error and exit
code 2, before any work; flags override the settings file."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from helpers.command_lines import refused, run_line
from hf_unlearn import __version__
from hf_unlearn.cli import COMMANDS, main
from hf_unlearn.deletion.arguments import RunArguments
from hf_unlearn.deletion.ledger_key import KEY_VARIABLE
from hf_unlearn.errors import DataError, OutputError, SettingsError, UnlearningError
from hf_unlearn.trainer.config import UnlearningConfig


def test_the_general_help_names_every_command_and_common_flag(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--help", "-h"):
        assert main([flag]) == 0
        text = capsys.readouterr().out
        assert all(name in text and description in text for name, description in COMMANDS.items())
        assert all(name in text for name in ("--json", "--debug", "--plugin", "--accelerate_config"))
        assert "exit codes: 0 done; 2 a wrong input" in text
    assert main([]) == 2 and "usage" in capsys.readouterr().out
    assert main(["--version"]) == 0 and capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_exits_with_0(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert f"hf-unlearn {command}" in text and "--json" in text and "--plugin" in text


def test_help_of_run_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--help"]) == 0
    text = capsys.readouterr().out
    for field in (*fields(RunArguments), *fields(UnlearningConfig)):
        if field.init:
            assert f"--{field.name}" in text, field.name


def test_an_unknown_command_names_the_closest_one_and_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["obliterate"], capsys)
    assert "obliterate" in line and all(name in line for name in COMMANDS) and "did you mean" not in line
    assert "unknown command 'evalute'; did you mean 'evaluate'?" in refused(["evalute"], capsys)


def test_a_closed_pipe_is_not_an_error_message() -> None:
    """`hf-unlearn --help | head -1`: the reader is gone before the text is written."""
    read, write = os.pipe()
    os.close(read)
    for argv in (["--help"], ["env", "--help"], ["--version"]):
        done = subprocess.run(
            [sys.executable, "-m", "hf_unlearn", *argv], stdout=write, stderr=subprocess.PIPE, text=True, timeout=120
        )
        assert done.returncode == 1 and not done.stderr
    os.close(write)
    complete = subprocess.run([sys.executable, "-m", "hf_unlearn", "--help"], capture_output=True, timeout=120)
    assert complete.returncode == 0 and complete.stdout  # negative control


def test_a_wrong_demo_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--output_dir", str(tmp_path / "out")]
    assert "unknown constraint 'hope'" in refused(["demo", "--constraint", "hope", *out], capsys)
    assert "unknown task 'poems'" in refused(["demo", "--task", "poems", *out], capsys)
    for spec in ("class:11", "class:x", "rows:0", "rows:99999", "three"):
        line = refused(["demo", "--forget", spec, *out], capsys)
        assert any(word in line for word in ("forget", "class", "rows"))
    assert "person:9" in refused(["demo", "--task", "text", "--forget", "person:9", *out], capsys)
    assert not (tmp_path / "out").exists()


def test_a_wrong_settings_file_is_refused(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "run.yaml"
    assert "cannot read settings" in refused(["run", str(file)], capsys)
    for text, message in (
        ("a: [1, 2", "cannot read settings"),
        ("- one\n- two", "not a YAML mapping"),
        ("forget: full\nforgett: full\n", "unknown settings: forgett; did you mean forget? see hf-unlearn run --help"),
    ):
        file.write_text(text)
        assert message in refused(["run", str(file)], capsys)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forget": "nothing"}, "nothing"),
        ({"forget": "full[a:b]"}, "malformed"),
        ({"forget": "full[0:2"}, "malformed"),
        ({"forget": ""}, "no forget split was named"),
        ({"forget": "full[40:50]"}, "full[40:50]"),
        ({"forget": "full[7:9]"}, "not in the train split"),
        ({"retain": "full[1:4]"}, "also in the retain set"),
        ({"model_name_or_path": "./no/such/model"}, "no/such/model"),
        ({"model_name_or_path": ""}, "no model was named"),
        ({"dataset_name": "./no/such/data"}, "no/such/data"),
        ({"constraint": "hope"}, "unknown constraint 'hope'"),
        ({"constraints": "energy,hope"}, "unknown constraint 'hope'"),
        ({"loss": "oblivion"}, "unknown loss 'oblivion'"),
        ({"loss": "pdu"}, "'pdu' needs the setting eps"),
        ({"loss": "nowhere:f"}, "cannot import loss 'nowhere:f'"),
        ({"loss": "dpo"}, "needs an alternate answer for each forget row"),
        ({"loss": "random_label"}, "'random_label' is for rows with a class label"),
        ({"forget_filter": "colour == 1"}, "unknown column 'colour'"),
        ({"forget_filter": 'completion == "?"'}, "selects none of the"),
        ({"forget_indices": "./no/such/file"}, "cannot read"),
        ({"holdout": "full[0:2]"}, "also in the holdout set"),
        ({"train_only": "nothing"}, "train_only: pattern 'nothing' matches no parameter"),
        ({"task": "image-classification"}, "a model of task language-model, and --task is image-classification"),
        ({"constraint_settings": '{"energy": 7}'}, "energy"),
        ({"constraint_settings": "0.5"}, "constraint_settings"),
        ({"statistics": "./no/such/statistics"}, "no/such/statistics"),
        ({"no_such_flag": "1"}, "no_such_flag"),
        ({"learning_rate": "much"}, "invalid float value: 'much'"),
        ({"ledger": "ledger"}, "--ledger needs its key"),
        ({"ledger": "ledger", "ledger_key_file": "./no/such/key"}, "no/such/key"),
        ({"ledger": "ledger", "ledger_key_file": "ledger/key"}, "keep the key elsewhere"),
        ({"ledger": "ledger", "constraints": "energy,none"}, "one constraint"),
        ({"ledger": "ledger", "use_peft": "True"}, "--merge_adapter True"),
        ({"energy_step": "0.01"}, "energy_step needs a series of requests; pass --ledger"),
        ({"forget_again": "True"}, "pass --ledger"),
        ({"retrained": "./no/such/retrained"}, "no/such/retrained"),
    ],
    ids=lambda value: "=".join(next(iter(value.items()))) if isinstance(value, dict) else "",
)
def test_a_wrong_run_is_one_line_and_writes_nothing(
    changes: dict[str, str],
    message: str,
    places: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    assert message in refused(run_line(places, tmp_path, **changes), capsys)
    assert not (tmp_path / "out").exists()


def test_statistics_of_another_model_are_refused(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(run_line(places, tmp_path, statistics=places["other"]), capsys)
    assert "statistics" in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["demo", "run", "collect", "evaluate", "audit"])
def test_a_folder_that_is_not_empty_stays_as_it_is(
    command: str,
    places: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept.txt").write_text("mine")
    out = ["--output_dir", str(tmp_path / "out")]
    common = ["--model_name_or_path", places["model"], "--dataset_name", places["data"]]
    argv = {
        "demo": ["demo", *out],
        "run": run_line(places, tmp_path),
        "collect": ["collect", *common, "--rows", "full", *out],
        "evaluate": ["evaluate", *common, "--forget", "full[0:2]", *out],
        "audit": ["audit", *common, "--forget", "full[0:2]", *out],
    }[command]

    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("the work began before the output folder was checked")

    for name in ("load_model", "load_processor"):
        monkeypatch.setattr(f"hf_unlearn.deletion.run.{name}", never)
    monkeypatch.setattr("hf_unlearn.demo.digits.train_vit", never)
    line = refused(argv, capsys)
    assert "is not empty" in line and "--overwrite_output_dir" in line
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["kept.txt"]


def test_debug_raises_the_error_itself(places: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="unknown constraint 'hope'"):
        main(["demo", "--constraint", "hope", "--debug"])
    with pytest.raises(DataError, match="malformed"):
        main([*run_line(places, tmp_path, forget="full[a:b]"), "--debug"])
    assert issubclass(OutputError, UnlearningError)


def test_flags_override_the_settings_file_which_overrides_the_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[RunArguments, UnlearningConfig]] = []

    class Stop(Exception):
        pass

    def spy(args: RunArguments, config: UnlearningConfig) -> Any:
        calls.append((args, config))
        raise Stop

    monkeypatch.setattr("hf_unlearn.deletion.run.run_request", spy)
    file = tmp_path / "run.yaml"
    file.write_text(
        "model_name_or_path: a\ndataset_name: b\nforget: c\nlearning_rate: 0.5\nloss: npo\nuse_cpu: true\n"
        "constraint_settings: {energy: 0.5}\nsamples: 3\n"
    )
    other = ["--learning_rate", "0.25", "--forget", "d[0:1]", "--constraint_settings", '{"energy": 0.75}']
    for argv in ([str(file)], [str(file), *other], ["--config", str(file)], [f"--config={file}", *other]):
        with pytest.raises(Stop):
            main(["run", *argv])
    assert repr(calls[2:]) == repr(calls[:2])
    (args, config), (overriding_args, overriding) = calls[:2]
    assert (args.forget, config.learning_rate, config.constraint_settings) == ("c", 0.5, {"energy": 0.5})
    assert (overriding_args.forget, overriding.learning_rate) == ("d[0:1]", 0.25)
    assert overriding.constraint_settings == {"energy": 0.75}
    for arguments, settings in calls:
        assert (arguments.model_name_or_path, arguments.samples, settings.loss) == ("a", 3, "npo")
        assert arguments.fine_tune is RunArguments().fine_tune and settings.constraint == "energy_ridge"
