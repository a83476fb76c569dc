"""Parsers of the commands: flags are made from the fields of dataclasses."""

import re
from argparse import ArgumentParser, HelpFormatter
from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from hf_unlearn.cli.plugins import import_plugin
from hf_unlearn.cli.settings_file import read_settings, take_flag, take_settings_file
from hf_unlearn.core.registry import suggestion
from hf_unlearn.core.text import one_line
from hf_unlearn.errors import SettingsError
from hf_unlearn.trainer.presets import CHOICES, PRESETS, overridden, preset

if TYPE_CHECKING:
    from transformers import HfArgumentParser

_UNKNOWN_FLAGS = re.compile(r"(?:unrecognized arguments:|are not used by the HfArgumentParser:)\s*(?P<flags>.+)")
_UNKNOWN_VALUE = re.compile(r"invalid choice: '(?P<value>[^']*)' \(choose from (?P<choices>.+)\)")
Parser = TypeVar("Parser", bound=ArgumentParser)


def make_parser(command: str, description: str, usage: str = "[options]") -> ArgumentParser:
    """Return the parser of a command without settings; a wrong flag raises `SettingsError`."""
    return _completed(ArgumentParser(**_layout(command, description, usage)), command)


def make_settings_parser(
    command: str, description: str, dataclasses: Sequence[type], usage: str = "[options]"
) -> "HfArgumentParser":
    """Return a parser whose flags are the fields of dataclasses; a wrong flag raises `SettingsError`."""
    from transformers import HfArgumentParser

    return _completed(HfArgumentParser(list(dataclasses), **_layout(command, description, usage)), command)


def make_run_parser(
    command: str, description: str, dataclasses: Sequence[type], usage: str = "[FILE.yaml] [options]"
) -> "HfArgumentParser":
    """As `make_settings_parser`, for a command that takes a settings file and can start on several processes."""
    parser = make_settings_parser(command, description, dataclasses, usage)
    _add_flag(parser, "--config", metavar="FILE", help="YAML file of settings, also as first argument; flags win.")
    if any(hasattr(dataclass, "from_preset") for dataclass in dataclasses):
        _add_flag(
            parser,
            "--preset",
            metavar="NAME",
            help=f"Named group of settings: {', '.join(PRESETS)}; the settings file and flags override it.",
        )
    _add_flag(
        parser,
        "--accelerate_config",
        metavar="NAME",
        help="Start several processes: ddp, fsdp2, zero2, zero3, or a YAML file of accelerate.",
    )
    _add_flag(
        parser, "--num_processes", type=int, help="Number of processes on all machines; default: the configuration's."
    )
    _add_flag(parser, "--num_machines", type=int, help="Number of machines; start the command on each of them.")
    _add_flag(parser, "--machine_rank", type=int, help="Number of this machine, from 0.")
    _add_flag(parser, "--main_process_ip", metavar="ADDRESS", help="Address of machine 0.")
    _add_flag(parser, "--main_process_port", metavar="PORT", help="A free port of machine 0.")
    return parser


def _layout(command: str, description: str, usage: str) -> dict[str, Any]:
    """Return what all parsers are made with."""
    return {
        "prog": f"hf-unlearn {command}",
        "usage": f"hf-unlearn {command} {usage}",
        "description": description,
        "formatter_class": HelpFormatter,
        "allow_abbrev": False,
    }


def _completed(parser: Parser, command: str) -> Parser:
    """Add the flags of every command, and raise `SettingsError` on a wrong flag instead of ending the process."""

    def error(message: str) -> NoReturn:
        raise _wrong_flag(command, _with_suggestion(message, parser))

    # `main` handles these before a command sees them; they are here for help and completion
    _add_flag(parser, "--json", action="store_true", help="Print one JSON document on standard output, nothing else.")
    _add_flag(parser, "--debug", action="store_true", help="Show the traceback of an error.")
    _add_flag(
        parser,
        "--plugin",
        action="append",
        metavar="MODULE_OR_FILE.py",
        help="Python module or file to import first; it registers constraints, losses, metrics, attacks or layers of "
        "your own. Repeatable.",
    )
    parser.error = error  # type: ignore[method-assign]
    return parser


def _with_suggestion(message: str, parser: ArgumentParser) -> str:
    """Add the closest known flag or value to a message of argparse about an unknown one."""
    if match := _UNKNOWN_FLAGS.search(message):
        known = [flag for flag in parser._option_string_actions if flag.startswith("--")]
        flags = [word.strip("'\",[]").partition("=")[0] for word in match["flags"].split()]
        unknown = [flag for flag in flags if flag.startswith("-") and not _is_number(flag)]
        if not unknown:  # values without a flag
            return f"unexpected {', '.join(flags)}: each setting is a flag and its value, such as --seed 1"
        hints = [f"did you mean {close[0]}?" for flag in unknown if (close := _closest(flag, known))]
        return " ".join([f"unknown {', '.join(unknown)};", *dict.fromkeys(hints)]).rstrip(";")
    if match := _UNKNOWN_VALUE.search(message):
        choices = [choice.strip().strip("'\"") for choice in match["choices"].split(",")]
        close = _closest(match["value"], choices)
        return message + (f"; did you mean {close[0]}?" if close else "")
    return message


def _closest(word: str, known: Sequence[str]) -> list[str]:
    """Return the closest known word, or nothing; a flag may be written with - for _, or without its underscores."""
    by_form = {_plain(name): name for name in reversed(known)}
    return [by_form[form] for form in get_close_matches(_plain(word), by_form, n=1, cutoff=0.7)]


def _plain(word: str) -> str:
    return word.strip("-").replace("-", "_").lower()


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _wrong_flag(command: str, message: str) -> SettingsError:
    return SettingsError(f"{command}: {message}; see hf-unlearn {command} --help")


def _add_flag(parser: ArgumentParser, name: str, **options: Any) -> None:
    if name not in parser._option_string_actions:  # TrainingArguments has a --debug of its own
        parser.add_argument(name, **options)


def parse(parser: "HfArgumentParser", argv: list[str]) -> tuple[Any, ...]:
    """Return the dataclasses of a parser, filled from the preset, then the settings file, then the flags.

    Raises:
        SettingsError: Unknown or wrong flag or setting, or a plug-in of the settings file that cannot be imported.
    """
    argv, file, preset_flag = list(argv), None, None
    has_presets = "--preset" in parser._option_string_actions
    if has_presets:
        argv, preset_flag = take_flag(argv, "--preset")
    if "--config" in parser._option_string_actions:
        argv, file = take_settings_file(argv)
    names = {field.name for dataclass in parser.dataclass_types for field in fields(dataclass)}
    known = names | {"plugin"} | ({"preset"} if has_presets else set())
    settings = {} if file is None else read_settings(file, known, parser.prog)
    plugins = settings.pop("plugin", None) or []
    for plugin in [plugins] if isinstance(plugins, str) else plugins:
        import_plugin(str(plugin))
    base = preset(preset_flag or settings.pop("preset", "default"))
    settings.pop("preset", None)
    usual = {name: parser.get_default(name) for name in CHOICES if name in names}
    chosen = {name: value for name in usual if (value := take_flag(argv, f"--{name}")[1])}
    parser.set_defaults(**overridden(overridden(usual | base, settings), chosen))
    try:
        return parser.parse_args_into_dataclasses(argv)[: len(parser.dataclass_types)]
    except SettingsError:
        raise
    except ValueError as error:
        raise _wrong_flag(parser.prog.split()[-1], _with_suggestion(one_line(error), parser)) from error


def check_choice(what: str, value: str, choices: Sequence[str]) -> None:
    """Raise `SettingsError` if `value` is not one of `choices`; the message names the closest one."""
    if value not in choices:
        raise SettingsError(f"unknown {what} {value!r}; {suggestion(value, list(choices))}")
