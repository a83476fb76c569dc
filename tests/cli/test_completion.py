"""Laws of `hf-unlearn completion`: the script completes every command, flag and choice."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest

from hf_unlearn.cli import COMMANDS, main
from hf_unlearn.cli.completion import SHELLS, complete_parser
from hf_unlearn.deletion.arguments import RunArguments
from hf_unlearn.trainer.config import UnlearningConfig


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_has_every_command_and_every_flag(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    commands = complete_parser()._subparsers._group_actions[0].choices  # type: ignore[union-attr]
    assert set(commands) == set(COMMANDS)
    flags = {flag for parser in commands.values() for action in parser._actions for flag in action.option_strings}
    expected = {f"--{f.name}" for settings in (RunArguments, UnlearningConfig) for f in fields(settings) if f.init}
    assert expected <= flags and {"--ledger_key_file", "--anchor", "--json", "--plugin", "--accelerate_config"} <= flags
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
