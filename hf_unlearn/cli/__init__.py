"""The `hf-unlearn` command: a table of commands, each of them a module of this package.

A command is one line of `COMMANDS` and a module of that name with `parser()`, from which help and completion are made,
and `main(argv) -> Answer`. Neither this file nor a module's name in the table loads torch or transformers.
"""

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from importlib import import_module

from hf_unlearn.cli.common import NO, Answer

COMMANDS: dict[str, str] = {
    "demo": "forget a class, single rows or an invented person, offline, and see that it worked",
    "collect": "collect the statistics of a data set, once, when the model is trained",
    "run": "fulfil a deletion request: statistics, unlearning, evaluation, output folder",
    "evaluate": "judge a finished model on forget, retain and held-out rows",
    "audit": "attack a finished model: can what was forgotten be brought back, or told apart",
    "benchmark": "compare methods, constraints and seeds on tofu, muse, wmdp, images or text; resumable",
    "push": "publish a finished output folder, or statistics, on the Hub; run again to resume",
    "ledger": "show or verify the record of deletion requests, or find a row in it",
    "completion": "print a script that completes commands and flags in a shell",
    "estimate": "say how large and how long a request is, and what settings fit, before it is run",
    "env": "print versions and devices, for bug reports",
}
LAUNCHED = ("collect", "run", "evaluate", "audit", "benchmark")
"""Commands that also start on several processes."""

_DESCRIPTION = "Make a pretrained model forget rows, and leave the rest of it alone."
_FOOTER = f"""hf-unlearn COMMAND --help lists the options. Of every command:
  --json    one JSON document on standard output and nothing else; of an error {{"error": ...}}
  --debug   the traceback of an error
{", ".join(LAUNCHED)} also start on several processes: --accelerate_config ddp | fsdp2 | zero2 | zero3 | FILE
[--num_processes N] [--num_machines M --machine_rank I --main_process_ip ADDRESS --main_process_port PORT].

exit codes: 0 done; 2 a wrong input, told in one line on standard error; {NO} the answer is no (ledger verify: damaged,
ledger prove: not in it); 1 anything else"""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        from hf_unlearn import __version__

        print(__version__)
        return 0
    if argv[0] not in COMMANDS:
        print(f"hf-unlearn: unknown command {argv[0]!r}; choose from {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # where it is installed it tells of what it lacks
    as_json, debug = "--json" in argv, "--debug" in argv
    argv = [a for a in argv if a not in ("--debug", "--json")]
    if argv[0] in LAUNCHED and any(a.split("=")[0] == "--accelerate_config" for a in argv):
        line = argv + ["--json"] * as_json + ["--debug"] * debug
        return _guarded(lambda: Answer("", None, _launch(line)), as_json, debug, silent=True)
    return _guarded(lambda: _run(argv[0], argv[1:]), as_json, debug)


def _usage() -> str:
    lines = [f"  {name:<11} {text}" for name, text in COMMANDS.items()]
    return "\n".join(["usage: hf-unlearn COMMAND [options]", "", _DESCRIPTION, "", *lines, "", _FOOTER])


def _launch(argv: list[str]) -> int:
    """Start the same command, without the flags of the launcher, on several processes; its exit code."""
    from hf_unlearn.cli.launch import launch

    return launch(argv)


def _run(command: str, argv: list[str]) -> Answer:
    if command != "demo":  # which runs on one process, whatever started it
        from hf_unlearn.cli.launch import check_processes

        check_processes()
    return import_module(f"hf_unlearn.cli.{command}").main(argv)


def _guarded(command: Callable[[], Answer], as_json: bool, debug: bool, silent: bool = False) -> int:
    """Run a command and print its answer, as text or JSON.

    An `UnlearningError` is one line and exit code 2, unless `debug` asks for the traceback. Of several processes one
    tells; `silent` where the processes of a launched command have told already.
    """
    from hf_unlearn.errors import UnlearningError

    tells = os.environ.get("RANK", "0") == "0"
    try:
        with redirect_stdout(sys.stderr) if as_json else nullcontext():  # libraries print, too
            answer = command()
        if tells and not silent:
            print(json.dumps(answer.content, allow_nan=False) if as_json else answer.text, flush=True)
        if "RANK" in os.environ:
            from hf_unlearn.core.processes import leave

            leave()
    except UnlearningError as error:
        if debug:
            raise
        if tells:
            print(f"hf-unlearn: {error}", file=sys.stderr)
            if as_json:
                print(json.dumps({"error": str(error)}))
        return 2
    return answer.code
