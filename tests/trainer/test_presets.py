"""Laws of presets: each is valid; explicit settings take precedence, and a flag over the preset of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hf_unlearn.cli import main
from hf_unlearn.deletion import run as runs
from hf_unlearn.deletion.arguments import RunArguments
from hf_unlearn.errors import SettingsError
from hf_unlearn.trainer.config import UnlearningConfig
from hf_unlearn.trainer.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_applied(name: str, tmp_path: Path) -> None:
    config = UnlearningConfig.from_preset(name, str(tmp_path), use_cpu=True)
    assert {setting: getattr(config, setting) for setting in PRESETS[name]} == dict(PRESETS[name])
    assert config.output_dir == str(tmp_path)


def test_explicit_settings_take_precedence(tmp_path: Path) -> None:
    config = UnlearningConfig.from_preset("paper", str(tmp_path), use_cpu=True, momentum=0.5)
    assert (config.loss, config.momentum, config.relative_step) == ("pgu", 0.5, False)
    assert UnlearningConfig(str(tmp_path), use_cpu=True).loss != "pgu"  # presets do not change the defaults


def test_settings_of_a_choice_are_dropped_with_it(tmp_path: Path) -> None:
    ridge = UnlearningConfig.from_preset("paper", str(tmp_path), use_cpu=True, constraint="ridge")
    assert ridge.constraint_settings is None and ridge.loss_settings == PRESETS["paper"]["loss_settings"]
    own = {"strength": 0.5}
    explicit = UnlearningConfig.from_preset(
        "paper", str(tmp_path), use_cpu=True, constraint="ridge", constraint_settings=own
    )
    assert explicit.constraint_settings == own
    same = UnlearningConfig.from_preset("paper", str(tmp_path), use_cpu=True, constraint="energy")
    assert same.constraint_settings == PRESETS["paper"]["constraint_settings"]


def test_an_unknown_preset_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SettingsError, match="unknown preset 'best'; choose from default, paper, robust"):
        UnlearningConfig.from_preset("best")
    assert main(["run", "--preset", "best"]) == 2
    assert "unknown preset 'best'" in capsys.readouterr().err


def test_precedence_is_flags_then_file_then_preset_then_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[UnlearningConfig] = []

    class Stop(Exception):
        pass

    def spy(args: RunArguments, config: UnlearningConfig) -> Any:
        seen.append(config)
        raise Stop

    monkeypatch.setattr(runs, "run_request", spy)
    file = tmp_path / "run.yaml"
    file.write_text("preset: paper\nlearning_rate: 0.5\nuse_cpu: true\n")
    calls = (
        [str(file)],
        ["--preset", "default", str(file)],
        [str(file), "--preset=paper", "--learning_rate", "0.25"],
        ["--preset", "paper", "--use_cpu", "True", "--num_train_epochs", "3"],
        ["--preset", "paper", "--use_cpu", "True", "--constraint", "kronecker", "--loss=npo"],
    )
    for argv in calls:
        with pytest.raises(Stop):
            main(["run", *argv])
    settings = [(config.loss, config.learning_rate, config.num_train_epochs) for config in seen]
    usual = UnlearningConfig(str(tmp_path), use_cpu=True)
    assert settings == [
        ("pgu", 0.5, 100),
        (usual.loss, 0.5, usual.num_train_epochs),
        ("pgu", 0.25, 100),
        ("pgu", 0.05, 3),
        ("npo", 0.05, 100),
    ]
    assert (seen[-1].constraint_settings, seen[-1].loss_settings) == (None, None)
