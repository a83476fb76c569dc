"""`hf-unlearn completion`: a static script from the same parsers that read the flags, made by shtab."""

import argparse
from importlib import import_module

import shtab
from transformers import HfArgumentParser

from hf_unlearn.cli import COMMANDS
from hf_unlearn.cli.common import Answer, make_parser

SHELLS = ("bash", "zsh", "fish")
_HOW = """to use it:  bash  hf-unlearn completion bash > ~/.local/share/bash-completion/completions/hf-unlearn
            zsh   hf-unlearn completion zsh > DIR/_hf-unlearn, with DIR in $fpath
            fish  hf-unlearn completion fish > ~/.config/fish/completions/hf-unlearn.fish"""


def parser() -> HfArgumentParser:
    made = make_parser("completion", "Print a completion script.", usage="bash | zsh | fish")
    made.add_argument("shell", choices=SHELLS, help="Which shell.")
    made.epilog, made.formatter_class = _HOW, argparse.RawDescriptionHelpFormatter
    return made


def main(argv: list[str]) -> Answer:
    shell = parser().parse_args(argv).shell
    script = shtab.complete(whole_parser(), shell=shell)
    return Answer(script, {"shell": shell, "script": script})


def whole_parser() -> argparse.ArgumentParser:
    """One parser of every command, each with all of its flags."""
    whole = argparse.ArgumentParser(prog="hf-unlearn")
    commands = whole.add_subparsers()
    for name, about in COMMANDS.items():
        own = import_module(f"hf_unlearn.cli.{name}").parser()
        commands.add_parser(name, parents=[own], help=about, add_help=False)
    return whole
