"""The `hf-unlearn` command: a table of commands, each of which is a module of this package.

A command is one line of `COMMANDS` and a module of that name with `parser()`, from which help and completion are made,
and `main(argv) -> Answer`. Neither this file nor the table loads torch or transformers.
"""

import logging
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module

from hf_unlearn.cli.answers import MISSED, NO, NOTHING_TO_FORGET, WRONG_INPUT, Answer, run_and_print
from hf_unlearn.cli.plugins import check_plugin, import_plugin, plugin_flags, take_plugins
from hf_unlearn.cli.setup import peft_hidden
from hf_unlearn.core.registry import suggestion

COMMANDS: dict[str, str] = {
    "demo": "forget a class, single rows or an invented person, offline, and see that it worked",
    "collect": "collect the statistics of a data set, once, when the model is trained",
    "run": "fulfil a deletion request: statistics, unlearning, evaluation, output folder",
    "evaluate": "evaluate a finished model on forget, retain and held-out rows",
    "audit": "attack a finished model: can the forgotten rows be brought back, or told apart",
    "benchmark": "compare methods, constraints and seeds on tofu, muse, wmdp, images or text; resumable",
    "push": "publish a finished output folder, or statistics, on the Hub; run again to resume",
    "ledger": "show or verify the record of deletion requests, or find a row in it",
    "completion": "print a script that completes commands and flags in a shell",
    "estimate": "estimate the memory and time of a request, and which settings fit, before it runs",
    "env": "print versions and devices, for bug reports",
}
LAUNCHED = ("collect", "run", "evaluate", "audit", "benchmark")
"""Commands that can also start on several processes."""
TRAINED = ("run", "benchmark", "estimate")
"""Commands whose parsers need `transformers.TrainingArguments`."""
HELP = ("-h", "--help")

_DESCRIPTION = "Make a pretrained model forget rows, and leave the rest of it unchanged."
_FOOTER = f"""hf-unlearn COMMAND --help lists the options. Every command takes:
  --json     print one JSON document on standard output and nothing else; for an error {{"error": ...}}
  --debug    show the traceback of an error
  --plugin MODULE_OR_FILE.py
             import this Python module or file first, which registers your own constraints, losses, metrics, attacks
             or layers; repeatable, and the key `plugin` of a settings file
{", ".join(LAUNCHED)} can also start on several processes:
  --accelerate_config ddp | fsdp2 | zero2 | zero3 | FILE [--num_processes N]
  [--num_machines M --machine_rank I --main_process_ip ADDRESS --main_process_port PORT]

exit codes: 0 done; {WRONG_INPUT} a wrong input, with one line on standard error;
{NO} the answer is "no" (ledger verify: damaged, ledger prove: not in it); 1 anything else;
run, with a complete output folder: {MISSED} the run ended and its mark was missed, {NOTHING_TO_FORGET} there was
nothing to forget (the rows had reached the mark before the first step), 0 the mark was reached or there is none"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; the entry point of the console script.

    Args:
        argv: Name and flags of the command; None for the arguments of this process.
    """
    try:
        code = _main(list(sys.argv[1:] if argv is None else argv), own_process=argv is None)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader, such as `head`, closed the pipe. Python flushes standard output once more when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _main(argv: list[str], own_process: bool) -> int:
    if not argv or argv[0] in HELP:
        print(_usage())
        return 0 if argv else WRONG_INPUT
    if argv[0] == "--version":
        from hf_unlearn import __version__

        print(__version__)
        return 0
    command, *flags = argv
    if command not in COMMANDS:
        print(f"hf-unlearn: unknown command {command!r}; {suggestion(command, list(COMMANDS))}", file=sys.stderr)
        return WRONG_INPUT
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns about backends that it does not find
    as_json, debug = "--json" in flags, "--debug" in flags
    rest = [flag for flag in flags if flag not in ("--debug", "--json")]

    def answer() -> Answer:
        if any(flag in HELP for flag in rest):
            return _help(command, rest, own_process)
        if command in LAUNCHED and any(flag.split("=")[0] == "--accelerate_config" for flag in rest):
            return _launch([command, *rest, *["--json"] * as_json, *["--debug"] * debug])
        return _run(command, rest)

    return run_and_print(answer, as_json, debug)


def _usage() -> str:
    lines = [f"  {name:<11} {text}" for name, text in COMMANDS.items()]
    return "\n".join(["usage: hf-unlearn COMMAND [options]", "", _DESCRIPTION, "", *lines, "", _FOOTER])


def _help(command: str, argv: list[str], own_process: bool) -> Answer:
    """Return the help text of a command, with the names that plug-ins register.

    Args:
        own_process: Whether the process ends after the text is printed, so that it can do without peft.
    """
    for plugin in take_plugins(argv)[1]:
        import_plugin(plugin)
    with peft_hidden() if own_process and command in TRAINED else nullcontext():
        text = import_module(f"hf_unlearn.cli.{command}").parser().format_help()
    return Answer(text.rstrip(), {"help": text})


def _launch(argv: list[str]) -> Answer:
    """Start the command, without the flags of the launcher, on several processes, which print the answer."""
    from hf_unlearn.cli.launch import launch

    for plugin in take_plugins(argv)[1]:
        check_plugin(plugin)  # the processes import it
    _check_flags(argv[0], argv[1:])
    return Answer(None, None, launch(argv))


def _check_flags(command: str, argv: Sequence[str]) -> None:
    """Raise `SettingsError` on a wrong flag or value, before several processes would fail at it."""
    from hf_unlearn.cli.settings_file import take_settings_file

    import_module(f"hf_unlearn.cli.{command}").parser().parse_args(take_settings_file(list(argv))[0])


def _run(command: str, argv: list[str]) -> Answer:
    if command != "demo":  # which runs on one process, however it was started
        from hf_unlearn.cli.launch import check_processes

        check_processes()
    argv, plugins = take_plugins(argv)
    for plugin in plugins:
        import_plugin(plugin)
    module = import_module(f"hf_unlearn.cli.{command}")
    return module.main([*argv, *plugin_flags(plugins)])  # at the end: a settings file comes first
