"""What the commands share: how settings become flags, and what a command answers."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from hf_unlearn.trainer.presets import CHOICES, PRESETS, overridden, preset

if TYPE_CHECKING:
    from transformers import HfArgumentParser

    from hf_unlearn.evaluation.report import UnlearningReport


NO = 3
"""Exit code of a question whose answer is no."""


@dataclass(frozen=True)
class Answer:
    """What a command says: as text, as JSON, and as an exit code. Progress goes to standard error, or nowhere."""

    text: str
    content: Any
    code: int = 0


def make_parser(command: str, about: str, kinds: Sequence[Any] = (), usage: str = "[options]") -> "HfArgumentParser":
    """Flags from the fields of dataclasses; a wrong flag raises `SettingsError` instead of ending the process."""
    from transformers import HfArgumentParser

    from hf_unlearn.errors import SettingsError

    def error(message: str) -> NoReturn:
        raise SettingsError(f"{command}: {message}; see hf-unlearn {command} --help")

    parser = HfArgumentParser(
        list(kinds), prog=f"hf-unlearn {command}", usage=f"hf-unlearn {command} {usage}", description=about,
        formatter_class=argparse.HelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    # `main` takes these away before a command sees them; they are here for help and completion
    _flag(parser, "--json", action="store_true", help="One JSON document on standard output and nothing else.")
    _flag(parser, "--debug", action="store_true", help="Show the traceback of an error.")
    parser.error = error
    return parser


def make_run_parser(
    command: str, about: str, kinds: Sequence[Any], usage: str = "[FILE.yaml] [options]"
) -> "HfArgumentParser":
    """As `make_parser`, for a command with a settings file that also starts on several processes."""
    parser = make_parser(command, about, kinds, usage)
    _flag(parser, "--config", metavar="FILE", help="YAML file of settings; flags override it. The first argument, too.")
    if any(hasattr(kind, "from_preset") for kind in kinds):
        _flag(
            parser, "--preset", metavar="NAME",
            help=f"Settings that belong together: {', '.join(PRESETS)}; those of the file and flags override them.",
        )  # fmt: skip
    _flag(
        parser, "--accelerate_config", metavar="NAME",
        help="Start on several processes: ddp, fsdp2, zero2, zero3, or a YAML file of accelerate.",
    )  # fmt: skip
    _flag(parser, "--num_processes", type=int, help="How many on all machines; default what the configuration says.")
    _flag(parser, "--num_machines", type=int, help="How many machines; the command is started on each.")
    _flag(parser, "--machine_rank", type=int, help="Which of them this is, from 0.")
    _flag(parser, "--main_process_ip", metavar="ADDRESS", help="Address of machine 0.")
    _flag(parser, "--main_process_port", metavar="PORT", help="A port of it that is free.")
    return parser


def _flag(parser: "HfArgumentParser", name: str, **options: Any) -> None:
    if name not in parser._option_string_actions:  # TrainingArguments has a --debug of its own
        parser.add_argument(name, **options)


def parse(parser: "HfArgumentParser", argv: list[str]) -> Any:
    """The dataclasses of a parser, filled; a preset and a settings file (first argument, or --config) give defaults."""
    from hf_unlearn.errors import SettingsError

    argv, file, named = list(argv), None, None
    has_presets = "--preset" in parser._option_string_actions
    if has_presets:
        argv, named = _taken(argv, "--preset")
    if "--config" in parser._option_string_actions:
        argv, file = _settings_file(argv)
    known = {f.name for kind in parser.dataclass_types for f in fields(kind)} | ({"preset"} if has_presets else set())
    settings = {} if file is None else _read(file, known)
    base = preset(named or settings.pop("preset", "default"))
    settings.pop("preset", None)
    usual = {name: parser.get_default(name) for name in CHOICES if name in known}
    chosen = {name: value for name in usual if (value := _taken(argv, f"--{name}")[1])}
    parser.set_defaults(**overridden(overridden(usual | base, settings), chosen))
    try:
        return parser.parse_args_into_dataclasses(argv)[: len(parser.dataclass_types)]
    except SettingsError:
        raise
    except ValueError as error:
        parser.error(str(error).splitlines()[0])


def is_settings_file(word: str) -> bool:
    return word.endswith((".yaml", ".yml"))


def _settings_file(argv: list[str]) -> tuple[list[str], Path | None]:
    if argv and not argv[0].startswith("-"):
        return argv[1:], Path(argv[0])
    argv, name = _taken(argv, "--config")
    return argv, Path(name) if name else None


def _taken(argv: list[str], flag: str) -> tuple[list[str], str | None]:
    """The arguments without a flag and its value, and that value."""
    for index, argument in enumerate(argv):
        name, _, value = argument.partition("=")
        if name == flag and (value or index + 1 < len(argv)):
            return argv[:index] + argv[index + 1 + (not value) :], value or argv[index + 1]
    return argv, None


def _read(path: Path, known: set[str]) -> dict[str, Any]:
    from hf_unlearn.core.files import read_yaml
    from hf_unlearn.errors import SettingsError

    content = read_yaml(path)
    if unknown := sorted(set(content) - known):
        raise SettingsError(f"{path} has unknown settings: {', '.join(unknown)}; see hf-unlearn run --help")
    return content


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    from hf_unlearn.errors import SettingsError

    if value not in choices:
        raise SettingsError(f"unknown {name} {value!r}; choose from {', '.join(choices)}")


def join_processes() -> None:
    """Meet the other processes of a distributed run, where training arguments have not done so."""
    from accelerate import PartialState

    PartialState()


def hush(bars: bool = True) -> None:
    """Leave errors and, for what takes minutes, progress bars; the notes of the libraries would bury the table."""
    import warnings

    import datasets
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


def show(reports: "dict[str, UnlearningReport]", output_dir: str, metric: str) -> Answer:
    """One table, the samples side by side, and where everything is."""
    from hf_unlearn.evaluation.tables import side_by_side

    first = next(iter(reports.values()))
    lines = [f"\n{metric} by split (forgotten: {first.request['rows']} rows of {first.request['source']})\n"]
    lines.append(side_by_side(reports, metric))
    for name, report in reports.items():
        lines.append(f"\n{name}: {report.method['stopped']}")
        for sample in report.samples:
            lines.append(f"  Q      {sample['prompt']}\n  before {sample['answer']}\n  after  {sample['after']}\n")
    lines += _series_lines(first)
    lines.append("\ntime: " + ", ".join(f"{phase} {value:.1f} s" for phase, value in first.timings.items()))
    several = "/<constraint>" if len(reports) > 1 else ""
    lines.append(f"checkpoint, report, card and plots: {output_dir}{several}")
    content = {"output_dir": output_dir, "reports": {name: report.content() for name, report in reports.items()}}
    return Answer("\n".join(lines), content)


def _series_lines(report: "UnlearningReport") -> list[str]:
    """What one of several requests in a row has used, left, and must be told of."""
    about = report.series
    if not about:
        return []
    room = f"room {about['room']['mean']:.2%}" if about["room"] else "room not measured"
    drift = about["drift_used"]
    of = f" of {drift['budget']:.4f}" if drift["budget"] is not None else ""
    used = f"drift used by all requests {drift['relative']:.4f}{of}"
    lines = [f"\nrequest {about['requests']} of its ledger: {room}, {used}, commitment {report.request['commitment']}"]
    return lines + [f"warning: {line}" for line in about["warnings"]]
