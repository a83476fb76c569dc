"""A model that cannot be saved is refused before any work, also on the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from helpers.command_lines import refused, run_line


def test_a_generation_config_that_cannot_be_written_is_one_line(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(places["model"], tmp_path / "model")
    path = tmp_path / "model" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.9}))
    line = run_line(places, tmp_path, model_name_or_path=str(tmp_path / "model"))
    assert "cannot be saved" in refused(line, capsys)
    assert not (tmp_path / "out").exists()
