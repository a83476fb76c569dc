"""Laws of the command line: help costs nothing and lists every setting; a wrong input is one line on standard error and
exit code 2, before any work; flags override the settings file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from helpers.append_entries import KEY
from helpers.tiny import tiny_gpt2
from transformers.utils import logging

from hf_unlearn import __version__
from hf_unlearn.cli import COMMANDS, main
from hf_unlearn.cli.common import NO
from hf_unlearn.cli.completion import SHELLS, whole_parser
from hf_unlearn.deletion import run as runs
from hf_unlearn.deletion.arguments import RunArguments
from hf_unlearn.deletion.ledger_key import KEY_VARIABLE
from hf_unlearn.errors import DataError, OutputError, SettingsError, UnlearningError
from hf_unlearn.evaluation.report import UnlearningReport
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.trainer.config import UnlearningConfig

WORDS = "who wrote the red book anna did and where was it found in paris".split()


@pytest.fixture(autouse=True)
def no_bars() -> None:
    """Progress bars share standard error with the one line; other tests turn them off for the whole process."""
    logging.disable_progress_bar()


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny GPT-2 with a word tokenizer, statistics of another model, and a data set with the split `full`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("cli")
    model, data, other = root / "model", root / "data", root / "other"
    vocabulary = {word: i for i, word in enumerate(["<end>", "<unk>", *dict.fromkeys(WORDS)])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>", unk_token="<unk>")
    tiny_gpt2().save_pretrained(model)
    tokenizer.save_pretrained(model)
    data.mkdir()
    rows = [{"prompt": f"who wrote {a} {b}", "completion": f"{b} {a} did"} for a in WORDS[:3] for b in WORDS[:3]]
    (data / "full.json").write_text("\n".join(map(json.dumps, rows)))
    collect_statistics(tiny_gpt2(seed=7), [{"input_ids": [3, 4, 5]}], progress=False).save_pretrained(other)
    stale = root / "stale"
    collect_statistics(tiny_gpt2(), [{"input_ids": [3, 4, 5]}], progress=False).save_pretrained(stale)
    return {"model": str(model), "data": str(data), "other": str(other), "stale": str(stale)}


def request(places: dict[str, str], out: Path, **changes: str) -> list[str]:
    """A `run` command line that is right but for `changes`."""
    flags = {
        "model_name_or_path": places["model"], "dataset_name": places["data"], "train": "full[0:6]",
        "forget": "full[0:2]", "holdout": "full[6:9]", "output_dir": str(out / "out"), "cache_dir": str(out / "cache"),
        "max_steps": "1", "use_cpu": "True", "disable_tqdm": "True",
    } | changes  # fmt: skip
    return ["run", *(part for name, value in flags.items() for part in (f"--{name}", value))]


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error of a command that exits with 2 and prints nothing else."""
    capsys.readouterr()
    assert main(argv) == 2
    captured = capsys.readouterr()
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("hf-unlearn: "), captured.err
    assert "Traceback" not in captured.err and not captured.out
    return lines[0]


def test_help_of_the_whole_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for flag in ("--help", "-h"):
        assert main([flag]) == 0
        text = capsys.readouterr().out
        assert all(name in text and about in text for name, about in COMMANDS.items())
        assert "exit codes: 0 done; 2 a wrong input" in text
    assert main([]) == 2 and "usage" in capsys.readouterr().out
    assert main(["--version"]) == 0 and capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_exits_with_0(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and f"hf-unlearn {command}" in text and "--json" in text


def test_help_of_run_lists_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", "--help"])
    text = capsys.readouterr().out
    for field in (*fields(RunArguments), *fields(UnlearningConfig)):
        if field.init:
            assert f"--{field.name}" in text, field.name


def test_an_unknown_command_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(["obliterate"], capsys)
    assert "obliterate" in line and all(name in line for name in COMMANDS)


def test_a_wrong_demo_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--output_dir", str(tmp_path / "out")]
    assert "unknown constraint 'hope'" in refused(["demo", "--constraint", "hope", *out], capsys)
    assert "unknown task 'poems'" in refused(["demo", "--task", "poems", *out], capsys)
    for spec in ("class:11", "class:x", "rows:0", "rows:99999", "three", ""):
        if spec:
            assert "forget" in (line := refused(["demo", "--forget", spec, *out], capsys)) or "class" in line or (
                "rows" in line
            )  # fmt: skip
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
        ("forget: full\nforgett: full\n", "unknown settings: forgett"),
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
        ({"forget_filter": "colour == 1"}, "there is no column 'colour'"),
        ({"forget_filter": 'completion == "?"'}, "selects none of the"),
        ({"forget_indices": "./no/such/file"}, "cannot read"),
        ({"holdout": "full[0:2]"}, "also in the holdout set"),
        ({"train_only": "nothing"}, "train_only: pattern 'nothing' matches no parameter"),
        ({"task": "image-classification"}, "cannot load the image processor"),
        ({"constraint_settings": '{"energy": 7}'}, "energy"),
        ({"constraint_settings": "0.5"}, "constraint_settings"),
        ({"statistics": "./no/such/statistics"}, "no/such/statistics"),
        ({"no_such_flag": "1"}, "no_such_flag"),
        ({"learning_rate": "much"}, "invalid float value: 'much'"),
        ({"ledger": "ledger"}, "--ledger needs its key"),
        ({"ledger": "ledger", "ledger_key_file": "./no/such/key"}, "no/such/key"),
        ({"ledger": "ledger", "ledger_key_file": "ledger/key"}, "keep its key elsewhere"),
        ({"ledger": "ledger", "constraints": "energy,none"}, "one constraint"),
        ({"ledger": "ledger", "use_peft": "True"}, "--merge_adapter True"),
        ({"energy_step": "0.01"}, "energy_step is of requests in a row; pass --ledger"),
        ({"forget_again": "True"}, "pass --ledger"),
        ({"retrained": "./no/such/retrained"}, "no/such/retrained"),
    ],
    ids=lambda value: "=".join(next(iter(value.items()))) if isinstance(value, dict) else "",
)
def test_a_wrong_run_is_one_line_and_writes_nothing(
    changes: dict[str, str], message: str, places: dict[str, str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    monkeypatch.chdir(tmp_path)
    assert message in refused(request(places, tmp_path, **changes), capsys)
    assert not (tmp_path / "out").exists()


def test_statistics_of_another_model_are_refused(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused(request(places, tmp_path, statistics=places["other"]), capsys)
    assert "statistics" in line and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["demo", "run", "collect", "evaluate", "audit"])
def test_a_folder_that_is_not_empty_is_left_as_it_is(
    command: str, places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept.txt").write_text("mine")
    out = ["--output_dir", str(tmp_path / "out")]
    common = ["--model_name_or_path", places["model"], "--dataset_name", places["data"]]
    argv = {
        "demo": ["demo", *out],
        "run": request(places, tmp_path),
        "collect": ["collect", *common, "--rows", "full", *out],
        "evaluate": ["evaluate", *common, "--forget", "full[0:2]", *out],
        "audit": ["audit", *common, "--forget", "full[0:2]", *out],
    }[command]

    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("work began before the output folder was looked at")

    for name in ("load_model", "load_processor"):
        monkeypatch.setattr(runs, name, never)
    monkeypatch.setattr("hf_unlearn.demo.digits.train_vit", never)
    line = refused(argv, capsys)
    assert "is not empty" in line and "--overwrite_output_dir" in line
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["kept.txt"]


def test_debug_raises_the_error_itself(places: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="unknown constraint 'hope'"):
        main(["demo", "--constraint", "hope", "--debug"])
    with pytest.raises(DataError, match="malformed"):
        main(["--debug" if i is None else i for i in request(places, tmp_path, forget="full[a:b]")] + ["--debug"])
    assert issubclass(OutputError, UnlearningError)


def test_flags_override_the_settings_file_and_it_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[RunArguments, UnlearningConfig]] = []

    class Stop(Exception):
        pass

    def spy(args: RunArguments, config: UnlearningConfig) -> Any:
        seen.append((args, config))
        raise Stop

    monkeypatch.setattr(runs, "run_request", spy)
    file = tmp_path / "run.yaml"
    file.write_text(
        "model_name_or_path: a\ndataset_name: b\nforget: c\nlearning_rate: 0.5\nloss: npo\nuse_cpu: true\n"
        "constraint_settings: {energy: 0.5}\nsamples: 3\n"
    )
    other = ["--learning_rate", "0.25", "--forget", "d[0:1]", "--constraint_settings", '{"energy": 0.75}']
    for argv in ([str(file)], [str(file), *other], ["--config", str(file)], [f"--config={file}", *other]):
        with pytest.raises(Stop):
            main(["run", *argv])
    assert repr(seen[2:]) == repr(seen[:2])
    (args, config), (changed_args, changed) = seen[:2]
    assert (args.forget, config.learning_rate, config.constraint_settings) == ("c", 0.5, {"energy": 0.5})
    assert (changed_args.forget, changed.learning_rate) == ("d[0:1]", 0.25)
    assert changed.constraint_settings == {"energy": 0.75}
    for arguments, settings in seen:
        assert (arguments.model_name_or_path, arguments.samples, settings.loss) == ("a", 3, "npo")
        assert arguments.fine_tune is RunArguments().fine_tune and settings.constraint == "energy_ridge"


def test_a_right_run_exits_with_0_and_its_folder_can_be_evaluated(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(request(places, tmp_path)) == 0
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
    assert main(request(places, tmp_path)) == 0
    folder = tmp_path / "out"
    weights = (folder / "model.safetensors").read_bytes()
    argv = ["audit", str(folder), "--dataset_name", places["data"], "--forget", "full[0:3]", "--holdout", "full[6:9]"]
    argv += ["--retrained", places["model"], "--relearn_steps", "1", "--max_length", "64"]
    argv += ["--attacks", "membership,relearning,quantisation,recalibration"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "quantised_4_bit_probability" in out and "verdict: relearned_probability: " in out
    assert "not run: recalibration: the model has no batch norm" in out
    assert not UnlearningReport.load(folder).audit  # nothing is written unless asked for
    assert main([*argv, "--update_model", "True"]) == 0
    report, card = UnlearningReport.load(folder), (folder / "README.md").read_text()
    assert report.audit["verdicts"] and report.get("answer_probability", "forget") is not None
    assert "quantised" in card and "relearned" in card
    assert (folder / "model.safetensors").read_bytes() == weights
    own = tmp_path / "own.md"
    own.write_text("---\n{{ card_data }}\n---\n\nOur words on {{ model_name }}.\n")
    assert main([*argv, "--update_model", "True", "--card_template", str(own)]) == 0
    assert "Our words on out." in (folder / "README.md").read_text()
    assert main([*argv, "--card_template", str(tmp_path / "missing.md")]) == 2
    assert "missing.md" in capsys.readouterr().err
    assert main([*argv, "--attacks", "no"]) == 2
    assert "unknown attack 'no'" in capsys.readouterr().err


# For machines


def answered(argv: list[str], capsys: pytest.CaptureFixture[str], code: int = 0) -> Any:
    """The one JSON document on standard output of a command."""
    capsys.readouterr()
    assert main([*argv, "--json"]) == code
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    return json.loads(out)


def test_json_is_one_document_whatever_the_libraries_print(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the Trainer's own prints on."""
    content = answered(request(places, tmp_path, disable_tqdm="False"), capsys)
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


def test_json_of_a_process_of_its_own_is_alone_on_standard_output(places: dict[str, str], tmp_path: Path) -> None:
    line = [sys.executable, "-m", "hf_unlearn", *request(places, tmp_path, disable_tqdm="False"), "--json"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["reports"]["energy_ridge"]["method"]["steps"] == 1
    assert done.stderr  # the bars are elsewhere


def test_env_says_versions_and_no_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert f"- hf-unlearn: {__version__}" in text and "- torch: " in text and "- devices: " in text
    assert str(Path.home()) not in text and "/" not in text.replace("platform", "")


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_has_every_command_and_every_flag(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    commands = whole_parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    assert set(commands) == set(COMMANDS)
    flags = {flag for own in commands.values() for action in own._actions for flag in action.option_strings}
    settings = {f"--{f.name}" for kind in (RunArguments, UnlearningConfig) for f in fields(kind) if f.init}
    assert settings <= flags and {"--ledger_key_file", "--anchor", "--json", "--config", "--accelerate_config"} <= flags
    for word in (*COMMANDS, *flags):
        assert (word.removeprefix("--") if shell == "fish" else word) in script, word
    assert "--no_such_flag" not in script


def test_bash_completes_commands_flags_and_choices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash")
    assert main(["completion", "bash"]) == 0
    (tmp_path / "script").write_text(capsys.readouterr().out)

    def complete(*words: str) -> set[str]:
        typed = " ".join(f"'{word}'" for word in words)
        code = f"""source {tmp_path}/script
            function=$(complete -p hf-unlearn | sed 's/.*-F \\([^ ]*\\).*/\\1/')
            COMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}
            $function hf-unlearn '{words[-1]}' '{words[-2]}'; printf '%s\\n' "${{COMPREPLY[@]}}\""""
        return set(subprocess.run([bash, "-c", code], capture_output=True, text=True, timeout=60).stdout.split())

    assert complete("hf-unlearn", "") >= set(COMMANDS)
    assert complete("hf-unlearn", "co") == {"collect", "completion"}
    assert complete("hf-unlearn", "run", "--forget_t") >= {"--forget_target"}
    assert complete("hf-unlearn", "ledger", "p") == {"prove"}
    assert complete("hf-unlearn", "ledger", "show", "--anc") == {"--anchor"}
    assert "--forget_target" not in complete("hf-unlearn", "ledger", "show", "--forget_t")


# The ledger


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    (tmp_path / "key").write_bytes(KEY)
    return tmp_path / "key"


def test_requests_in_a_row_by_flags_alone_and_their_ledger(
    places: dict[str, str], tmp_path: Path, key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each goes on from the last model; the rows of both are tested again; the ledger knows them and no others."""
    flags = {"ledger": str(tmp_path / "ledger"), "ledger_key_file": str(key), "eval_splits": "full[6:7]"}
    forget, reports = ["full[0:2]", "full[2:3]", "full[4:5]"], []
    for number, split in enumerate(forget):
        more = {"forget": split, "output_dir": str(tmp_path / f"out-{number}"), "energy_step": "0.02"}
        more |= {"constraint_settings": '{"energy": 0.8}', "max_retain_drift": "9"}
        content = answered(request(places, tmp_path, **flags, **more), capsys)
        reports.append(content["reports"]["energy_ridge"])
        assert reports[-1] == UnlearningReport.load(tmp_path / f"out-{number}").content()
    assert [r["request"]["number"] for r in reports] == [1, 2, 3]
    assert [r["method"]["constraint_settings"]["energy"] for r in reports] == pytest.approx([0.8, 0.82, 0.84])
    assert [r["method"]["statistics"]["rows"] for r in reports] == [4, 3, 2]
    left = [r["settings"]["max_retain_drift"] for r in reports]
    assert left == pytest.approx([9.0, *(9 - r["series"]["drift_used"]["relative"] for r in reports[:2])])
    last = {(m["split"], m["model"]): m for m in reports[2]["metrics"] if m["name"] == "loss"}
    assert {split: last[split, "unlearned"]["n"] for split in ("forgotten_1", "forgotten_2", "forget", "retain")} == {
        "forgotten_1": 2, "forgotten_2": 1, "forget": 1, "retain": 2,
    }  # fmt: skip
    after = {m["split"]: m["value"] for m in reports[1]["metrics"] if (m["name"], m["model"]) == ("loss", "unlearned")}
    assert last["forgotten_2", "original"]["value"] == pytest.approx(after["forget"], rel=1e-5)  # it went on from there

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
    one_more = request(places, tmp_path, **flags, forget="full[5:6]", output_dir=str(tmp_path / "text"))
    assert main([*one_more, "--max_retain_drift", "9"]) == 0
    text = capsys.readouterr().out
    assert "request 4 of its ledger: room " in text and " of 9.0000, commitment " in text
    again = request(places, tmp_path, **flags, forget="full[1:2]", output_dir=str(tmp_path / "again"))
    assert "in request 1 already" in refused(again, capsys)
    spent = request(places, tmp_path, **flags, forget="full[3:4]", max_retain_drift="1e-9")
    assert "no room is left" in refused(spent, capsys)
    path = tmp_path / "ledger" / "ledger.jsonl"
    path.write_text(path.read_text().replace("full[0:2]", "full[0:3]"))
    assert main(["ledger", "verify", *ledger]) == NO and main(["ledger", "show", *ledger]) == NO
    assert "cannot be trusted" in refused(["ledger", "prove", rows[0], *keyed], capsys)


def test_a_moved_model_and_statistics_collected_afresh_go_on(
    places: dict[str, str], tmp_path: Path, key: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = {"ledger": str(tmp_path / "ledger"), "ledger_key_file": str(key)}
    assert main(request(places, tmp_path, **flags)) == 0
    (tmp_path / "out").rename(tmp_path / "moved")
    more = {**flags, "forget": "full[2:4]", "output_dir": str(tmp_path / "next")}
    assert "go on from that model" in refused(request(places, tmp_path, **more), capsys)
    more["model_name_or_path"] = str(tmp_path / "moved")
    assert "other weights" in refused(request(places, tmp_path, **more, statistics=places["stale"]), capsys)
    collected = ["--model_name_or_path", str(tmp_path / "moved"), "--dataset_name", places["data"]]
    assert main(["collect", *collected, "--rows", "full[2:6]", "--output_dir", str(tmp_path / "fresh")]) == 0
    capsys.readouterr()
    report = answered(request(places, tmp_path, **more, statistics=str(tmp_path / "fresh")), capsys)["reports"][
        "energy_ridge"
    ]
    assert report["series"]["statistics_carried_from"] == [] and report["method"]["statistics"]["rows"] == 2


@pytest.mark.parametrize("row", ["[1]", "{", "full.json:1", "nowhere", "{}", "full.json:0", "full.json:x"])
def test_a_row_that_is_none_is_refused(row: str, tmp_path: Path, key: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--ledger", str(tmp_path), "--ledger_key_file", str(key)]
    assert "row" in refused(["ledger", "prove", row, *flags], capsys)
    assert "prove needs one row" in refused(["ledger", "prove", *flags], capsys)
    assert "prove needs one row" in refused(["ledger", "show", "{}", *flags], capsys)
    assert "there is no ledger" in refused(["ledger", "show", *flags], capsys)
