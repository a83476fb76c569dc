"""Laws of `--plugin`: what a module of the user registers is available to the command; a wrong plug-in is one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.command_lines import FINISHED, answered, refused, run_line
from helpers.tiny import tiny_llama
from hf_unlearn.cli import main
from hf_unlearn.cli.plugins import take_plugins
from hf_unlearn.constraints.registry import CONSTRAINTS
from hf_unlearn.losses import LOSSES

CONSTRAINT = '''
from dataclasses import dataclass
from hf_unlearn import Constraint, register_constraint
from hf_unlearn.constraints.factors import Scale

@register_constraint("plugin_halve")
@dataclass(frozen=True)
class HalveConstraint(Constraint):
    """Half of each step, whatever the retain rows."""
    share: float = 0.5

    def right(self, gram):
        return Scale(gram.spectrum_I.new_full((gram.spectrum_I.numel(),), self.share))
'''
LOSS = """
from hf_unlearn import register_loss

@register_loss("plugin_ascent")
def plugin_ascent(predictions, original, *, scale=1.0):
    return -scale * predictions.nll_L
"""


@pytest.fixture
def files(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A file with a constraint and one with a loss."""
    constraint, loss = tmp_path / "my_constraint.py", tmp_path / "my_loss.py"
    constraint.write_text(CONSTRAINT)
    loss.write_text(LOSS)
    yield constraint, loss
    CONSTRAINTS.remove("plugin_halve")
    LOSSES.remove("plugin_ascent")


def test_run_unlearns_with_a_constraint_and_a_loss_of_plugins(
    files: tuple[Path, Path], places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = {"constraint": "plugin_halve", "loss": "plugin_ascent", "loss_settings": '{"scale": 0.5}'}
    chosen["forget_target"] = "1e-9"  # the model was not trained: there would be nothing to forget
    line = run_line(places, tmp_path, **chosen)
    assert "unknown" in refused(line, capsys)  # negative control: the same line without its plug-ins
    flags = ["--plugin", str(files[0]), f"--plugin={files[1]}"]
    report = answered([*line, *flags], capsys)["reports"]["plugin_halve"]
    assert (report["method"]["constraint"], report["method"]["loss"]) == ("plugin_halve", "plugin_ascent")
    assert report["method"]["steps"] == 1


def test_the_settings_file_can_name_plugins(
    files: tuple[Path, Path], places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = tmp_path / "run.yaml"
    settings.write_text(f"constraint: plugin_halve\nloss: plugin_ascent\nplugin: [{files[0]}, {files[1]}]\n")
    _, *flags = run_line(places, tmp_path)
    assert "plugin_halve" in answered(["run", str(settings), *flags], capsys)["reports"]


def test_estimate_counts_a_constraint_of_a_plugin(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_llama().config.save_pretrained(tmp_path / "model")
    line = ["estimate", str(tmp_path / "model"), "--max_length", "16", "--batch_size", "2"]
    flags = ["--constraint", "plugin_halve", "--loss", "plugin_ascent"]
    plugins = ["--plugin", str(files[0]), "--plugin", str(files[1])]
    assert "unknown constraint 'plugin_halve'" in refused([*line, *flags], capsys)
    estimate = answered([*line, *flags, *plugins], capsys)
    assert estimate["memory"]["held"]["constraint"] > 0
    assert all(f"--plugin {file}" in estimate["plans"][0]["launch"] for file in files)


def test_help_lists_what_a_plugin_registers(files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """A new process is asked, because the names in help texts are fixed when the parser's module is imported."""
    line = [sys.executable, "-m", "hf_unlearn", "demo", "--help"]
    plain, extended = (
        subprocess.run([*line, *flags], capture_output=True, text=True, timeout=300).stdout
        for flags in ([], ["--plugin", str(files[0])])
    )
    assert "plugin_halve" in extended and "plugin_halve" not in plain


def test_modules_are_found_in_the_current_folder(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    assert main(["env", "--plugin", "my_constraint"]) == 0
    assert "plugin_halve" in CONSTRAINTS and sys.path == path
    monkeypatch.delitem(sys.modules, "my_constraint")


def test_a_wrong_plugin_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = str(tmp_path / "missing.py")
    for command in (["run"], ["run", "--accelerate_config", "ddp"], ["collect"], ["evaluate"], ["estimate"], ["env"]):
        assert "there is no plug-in file" in refused([*command, "--plugin", missing], capsys)
    assert "No module named 'no_such_module'" in refused(["run", "--plugin", "no_such_module"], capsys)
    broken = tmp_path / "broken.py"
    for source, reason in (
        ("x = 1\nundefined", "NameError: name 'undefined' is not defined (broken.py, line 2)"),
        ("def f(:", "SyntaxError"),
        ("from hf_unlearn import register_loss\nregister_loss('npo')(print)", "'npo' is registered already"),
    ):
        broken.write_text(source)
        line = refused(["run", "--plugin", str(broken)], capsys)
        assert "broken.py' cannot be imported" in line and reason in line
    with pytest.raises(Exception, match="cannot be imported"):
        main(["run", "--plugin", str(broken), "--debug"])


def test_plugins_are_taken_from_anywhere_among_the_flags() -> None:
    argv = ["file.yaml", "--plugin", "a", "--loss", "npo", "--plugin=b.py"]
    assert take_plugins(argv) == (["file.yaml", "--loss", "npo"], ["a", "b.py"])


def test_launched_processes_import_the_plugins(
    files: tuple[Path, Path], places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = run_line(places, tmp_path, constraint="plugin_halve", loss="plugin_ascent")
    launcher = ["--accelerate_config", "ddp", "--num_processes", "1"]
    plugins = ["--plugin", str(files[0]), "--plugin", str(files[1])]
    done = subprocess.run(
        [sys.executable, "-m", "hf_unlearn", *line, *plugins, *launcher, "--json"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode in FINISHED, done.stderr[-2000:]
    assert "plugin_halve" in json.loads(done.stdout)["reports"]
