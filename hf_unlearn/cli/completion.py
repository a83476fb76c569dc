"""`hf-unlearn completion`: a static script, made by shtab from the parsers that read the flags."""

from argparse import ArgumentParser, RawDescriptionHelpFormatter
from importlib import import_module

from hf_unlearn.cli import COMMANDS
from hf_unlearn.cli.answers import Answer
from hf_unlearn.cli.parsers import make_parser

SHELLS = ("bash", "zsh", "fish")
_HOW = """to use it:  bash  hf-unlearn completion bash > ~/.local/share/bash-completion/completions/hf-unlearn
            zsh   hf-unlearn completion zsh > DIR/_hf-unlearn, with DIR in $fpath
            fish  hf-unlearn completion fish > ~/.config/fish/completions/hf-unlearn.fish"""


def parser() -> ArgumentParser:
    flags = make_parser("completion", "Print a completion script.", usage="bash | zsh | fish")
    flags.add_argument("shell", choices=SHELLS, help="Name of the shell.")
    flags.epilog, flags.formatter_class = _HOW, RawDescriptionHelpFormatter
    return flags


def main(argv: list[str]) -> Answer:
    import shtab

    shell = parser().parse_args(argv).shell
    script = shtab.complete(complete_parser(), shell=shell)
    return Answer(script, {"shell": shell, "script": script})


def complete_parser() -> ArgumentParser:
    """Return one parser with all commands, each with all of its flags."""
    complete = ArgumentParser(prog="hf-unlearn")
    commands = complete.add_subparsers()
    for name, description in COMMANDS.items():
        flags = import_module(f"hf_unlearn.cli.{name}").parser()
        commands.add_parser(name, parents=[flags], help=description, add_help=False)
    return complete
