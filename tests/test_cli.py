"""Laws of the command line: help costs nothing and lists every setting; a wrong input is one line on standard error and
exit code 2, before any work; flags override the settings file."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from cases import tiny_gpt2
from transformers.utils import logging

from hf_unlearn import __version__, runs
from hf_unlearn.cli import COMMANDS, main
from hf_unlearn.collect import collect_statistics
from hf_unlearn.config import UnlearningConfig
from hf_unlearn.errors import DataError, OutputError, SettingsError, UnlearningError
from hf_unlearn.report import UnlearningReport
from hf_unlearn.runs import RunArguments

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
    return {"model": str(model), "data": str(data), "other": str(other)}


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
    assert main([]) == 2 and "usage" in capsys.readouterr().out
    assert main(["--version"]) == 0 and capsys.readouterr().out.strip() == __version__


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_exits_with_0(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and f"hf-unlearn {command}" in text
    assert ("--revision" if command == "push" else "--output_dir") in text


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
        ({"retrained": "./no/such/retrained"}, "no/such/retrained"),
    ],
    ids=lambda value: "=".join(next(iter(value.items()))) if isinstance(value, dict) else "",
)
def test_a_wrong_run_is_one_line_and_writes_nothing(
    changes: dict[str, str], message: str, places: dict[str, str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
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

    for name in ("load_model", "load_tokenizer"):
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

    monkeypatch.setattr(runs, "run", spy)
    file = tmp_path / "run.yaml"
    file.write_text(
        "model_name_or_path: a\ndataset_name: b\nforget: c\nlearning_rate: 0.5\nloss: npo\nuse_cpu: true\n"
        "constraint_settings: {energy: 0.5}\nsamples: 3\n"
    )
    for extra in ([], ["--learning_rate", "0.25", "--forget", "d[0:1]", "--constraint_settings", '{"energy": 0.75}']):
        with pytest.raises(Stop):
            main(["run", str(file), *extra])
    (args, config), (changed_args, changed) = seen
    assert (args.forget, config.learning_rate, config.constraint_settings) == ("c", 0.5, {"energy": 0.5})
    assert (changed_args.forget, changed.learning_rate) == ("d[0:1]", 0.25)
    assert changed.constraint_settings == {"energy": 0.75}
    for arguments, settings in seen:
        assert (arguments.model_name_or_path, arguments.samples, settings.loss) == ("a", 3, "npo")
        assert arguments.fine_tune is RunArguments().fine_tune and settings.constraint == "energy"


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
    assert main([*argv, "--attacks", "no"]) == 2
    assert "unknown attack 'no'" in capsys.readouterr().err
