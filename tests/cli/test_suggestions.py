"""Laws of words that a command does not know: it names the closest one that it knows, in one line."""

from __future__ import annotations

import pytest

from hf_unlearn.cli import main


@pytest.mark.parametrize(
    ("argv", "seen"),
    [
        (["runn"], "did you mean 'run'?"),
        (["run", "--los", "npo"], "unknown --los; did you mean --loss?"),
        (["run", "--forgetfilter=a"], "unknown --forgetfilter; did you mean --forget_filter?"),
        (["run", "--max-retain-drfit", "1"], "did you mean --max_retain_drift?"),
        (["collect", "--row", "full"], "unknown --row; did you mean --rows?"),
        (["evaluate", "--orignal", "a", "--batchsize", "3"], "did you mean --original?"),
        (["push", "a", "b", "--prvate"], "unknown --prvate; did you mean --private?"),
        (["run", "--task", "text-clasification"], "did you mean text-classification?"),
        (["completion", "bsh"], "did you mean bash?"),
        (["ledger", "verfy"], "did you mean verify?"),
        (["run", "--loss", "npoo", "--train", "a", "--forget", "b"], "did you mean 'npo'?"),
    ],
)
def test_an_unknown_word_is_answered_with_the_closest_known_one(
    argv: list[str], seen: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert seen in line


def test_a_word_that_is_close_to_none_gets_no_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--zzzz", "1"]) == 2
    line = capsys.readouterr().err
    assert "unknown --zzzz; see hf-unlearn run --help" in line and "did you mean" not in line
    assert main(["collect", "--rows", "full", "another"]) == 2
    assert "another" in capsys.readouterr().err
