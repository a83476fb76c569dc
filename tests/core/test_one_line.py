"""Laws of the errors of libraries in one line: the useful part is in it, wherever it stands in the text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from hf_unlearn.core.files import read_yaml
from hf_unlearn.core.text import one_line
from hf_unlearn.errors import DataError, ModelError, SettingsError


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("one of: \n(1) a file, \n(2) a class", "one of: (1) a file, (2) a class"),
        ("\n\n  first\n\tsecond ", "first second"),
        ("", "ValueError"),
        ("word " * 100, ("word " * 60).rstrip() + " ..."),
    ],
)
def test_all_lines_are_in_it_up_to_a_length(text: str, seen: str) -> None:
    assert one_line(ValueError(text)) == seen


def test_the_cause_completes_a_text_that_says_little_and_no_other() -> None:
    for text, has_cause in (("An error occurred", True), ("x" * 90, False), ("it says: the cause", False)):
        error = ValueError(text)
        error.__cause__ = KeyError("the cause")
        assert (one_line(error) == f"{text}: 'the cause'") == has_cause or "the cause" in text


def test_errors_of_libraries_show_their_useful_part(tmp_path: Path) -> None:
    from hf_unlearn.data.splits import load_rows
    from hf_unlearn.models.loading import load_tokenizer

    (tmp_path / "settings.yaml").write_text("loss: npo\nconstraint energy\nseed: 1\n")
    with pytest.raises(SettingsError, match="line 3, column") as caught:  # the first line is "while scanning ..."
        read_yaml(tmp_path / "settings.yaml")
    assert isinstance(caught.value.__cause__, yaml.YAMLError) and "\n" not in str(caught.value)
    for kind, seen in (("llama", "sentencepiece"), ("gpt2", "no vocabulary"), ("bert", "no vocabulary")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        with pytest.raises(ModelError, match=seen) as of_tokenizer:  # the first line is "... from one of: "
            load_tokenizer(str(tmp_path))
        assert "\n" not in str(of_tokenizer.value)
    (tmp_path / "full.json").write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(DataError, match=r"JSON|json") as of_rows:
        load_rows(str(tmp_path), "full", "forget")
    assert "\n" not in str(of_rows.value)
