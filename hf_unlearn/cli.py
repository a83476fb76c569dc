"""The `hf-unlearn` command: demo, collect, run, evaluate, audit.

Every field of the settings is a flag; `run`, `evaluate` and `audit` also take a YAML file, whose values flags override.
Exit codes: 0 done, 2 a wrong input (one line on standard error), 1 anything else.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

COMMANDS: dict[str, str] = {
    "demo": "forget a class, single rows or an invented person, offline, and see that it worked",
    "collect": "collect the statistics of a data set, once, when the model is trained",
    "run": "fulfil a deletion request: statistics, unlearning, evaluation, output folder",
    "evaluate": "judge a finished model on forget, retain and held-out rows",
    "audit": "attack a finished model: can what was forgotten be brought back, or told apart",
    "push": "publish a finished output folder, or statistics, on the Hub; run again to resume",
}


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
    debug = "--debug" in argv
    argv = [a for a in argv if a != "--debug"]
    if argv[0] != "demo" and any(a.split("=")[0] == "--accelerate_config" for a in argv):
        codes: list[int] = []
        return _guarded(lambda argv: codes.append(_launch(argv)), argv, debug) or codes[0]
    return _guarded(globals()[f"_{argv[0]}"], argv[1:], debug)


def _launch(argv: list[str]) -> int:
    """Start the same command, without the flags of the launcher, on several processes; its exit code."""
    from hf_unlearn.launch import launch

    return launch(argv)


def _usage() -> str:
    lines = [f"  {name:<10}{text}" for name, text in COMMANDS.items()]
    return "\n".join(["usage: hf-unlearn COMMAND [options]", "", __doc__.splitlines()[0], "", *lines, "", _FOOTER])


_FOOTER = """hf-unlearn COMMAND --help lists the options; --debug shows the traceback of an error.
collect, run, evaluate and audit start on several processes with --accelerate_config ddp | fsdp2 | zero2 | zero3 | FILE
[--num_processes N] [--num_machines M --machine_rank I --main_process_ip ADDRESS --main_process_port PORT]."""


def _guarded(command: Callable[[list[str]], None], argv: list[str], debug: bool) -> int:
    """Run a command; an `UnlearningError` is one line and exit code 2, unless `--debug` asks for the traceback."""
    from hf_unlearn.errors import UnlearningError

    try:
        if command is not _demo:
            from hf_unlearn.launch import check_processes

            check_processes()
        command(argv)
        if "RANK" in os.environ:
            from hf_unlearn.sharding import leave

            leave()
    except UnlearningError as error:
        if debug:
            raise
        if os.environ.get("RANK", "0") == "0":  # of several processes one tells
            print(f"hf-unlearn: {error}", file=sys.stderr)
        return 2
    return 0


def _demo(argv: list[str]) -> None:
    from hf_unlearn.config import setting
    from hf_unlearn.constraints import CONSTRAINTS

    @dataclass
    class DemoArguments:
        output_dir: str = setting("outputs/demo", "Where checkpoint, report, card and plots go.")
        task: str = setting("digits", "digits (a vision transformer) or text (a chat model and five invented people).")
        forget: str | None = setting(
            None, "class:C or rows:N (digits, default class:3); person:P (text, default person:1)."
        )
        constraint: str | None = setting(
            None, f"{', '.join(CONSTRAINTS)} or all of them; default kronecker (class), ridge (rows), energy (text)."
        )
        seed: int = setting(0, "Seed of the splits and of training.")
        model: str | None = setting(None, "Folder or Hub id of the chat model of the text task.")
        cache_dir: str | None = setting(None, "Where the text task's fine-tuned models are kept.")
        overwrite_output_dir: bool = setting(False, "Replace what is in the output folder.")

    (args,) = _parse("demo", [DemoArguments], argv)
    _check_choice("task", args.task, ("digits", "text"))
    if args.constraint is not None:
        _check_choice("constraint", args.constraint, (*CONSTRAINTS, "all"))
    _hush(bars=args.task == "text")
    common = {"seed": args.seed, "overwrite": args.overwrite_output_dir}
    if args.task == "digits":
        from hf_unlearn.demo.digits import run_digits

        reports = run_digits(args.output_dir, args.forget or "class:3", args.constraint, **common)
        _show(reports, args.output_dir, "accuracy")
        return
    from hf_unlearn.demo.people import DEFAULT_MODEL, run_people

    common |= {"model": args.model or DEFAULT_MODEL, "cache_dir": args.cache_dir}
    reports = run_people(args.output_dir, args.forget or "person:1", args.constraint or "energy", **common)
    _show(reports, args.output_dir, "answer_probability")


def _collect(argv: list[str]) -> None:
    from hf_unlearn.config import setting
    from hf_unlearn.runs import DataArguments, collect
    from hf_unlearn.sharding import is_main

    @dataclass
    class CollectArguments(DataArguments):
        rows: str = setting("", "Split to collect on: name or name[start:stop].")
        fisher: bool = setting(False, "Also collect Fishers, for the Kronecker constraint and predicted KL.")
        max_length: int | None = setting(512, "Longest row in tokens, the same as in the run; longer rows are cut.")
        output_dir: str = setting("statistics", "Where the statistics go.")
        overwrite_output_dir: bool = setting(False, "Replace what is in the output folder.")

    (args,) = _parse("collect", [CollectArguments], argv)
    _join_processes()
    _hush()
    statistics = collect(
        args, args.rows, args.fisher, args.output_dir, args.overwrite_output_dir, max_length=args.max_length
    )
    if is_main():
        print(statistics.summary())
        print(f"saved to {args.output_dir}")


def _run(argv: list[str]) -> None:
    from hf_unlearn.config import UnlearningConfig
    from hf_unlearn.runs import RunArguments, run
    from hf_unlearn.sharding import is_main

    args, config = _parse("run", [RunArguments, UnlearningConfig], argv)
    _hush()
    reports = run(args, config)
    if is_main():
        _show(reports, config.output_dir or "unlearned", "answer_probability")


def _evaluate(argv: list[str]) -> None:
    from hf_unlearn.config import setting
    from hf_unlearn.runs import RunArguments, evaluate
    from hf_unlearn.sharding import is_main

    @dataclass
    class EvaluateArguments(RunArguments):
        original: str | None = setting(None, "Folder or Hub id of the model before unlearning.")
        max_length: int | None = setting(512, "Longest row in tokens, as in the run; longer rows are cut.")
        per_device_eval_batch_size: int = setting(16, "Rows a forward pass.")
        seed: int = setting(0, "Seed of the bootstrap.")
        output_dir: str | None = setting(None, "Also write the report to this folder.")
        overwrite_output_dir: bool = setting(False, "Replace what is in the output folder.")

    (args,) = _parse("evaluate", [EvaluateArguments], argv)
    _join_processes()
    _hush()
    from hf_unlearn.files import check_output, replace_folder

    if args.output_dir:
        check_output(args.output_dir, args.overwrite_output_dir)
    report = evaluate(args, args.original, args.per_device_eval_batch_size, args.seed, args.max_length)
    if not is_main():
        return
    print(report.table())
    if args.output_dir:
        with replace_folder(args.output_dir, args.overwrite_output_dir) as folder:
            report.save(folder)
        print(f"saved to {args.output_dir}")


def _audit(argv: list[str]) -> None:
    from hf_unlearn.attacks import ALL, AuditSettings
    from hf_unlearn.config import setting
    from hf_unlearn.runs import RunArguments, add_to_model, attack
    from hf_unlearn.sharding import is_main

    @dataclass
    class AuditArguments(RunArguments):
        original: str | None = setting(None, "Folder or Hub id of the model before unlearning.")
        attacks: str | None = setting(None, f"Which, with commas: {', '.join(ALL)}; default: all that are possible.")
        relearn_rows: int = setting(5, "Forget rows that the attacker trains on; the others are judged.")
        relearn_steps: int = setting(8, "Steps of that training.")
        relearn_learning_rate: float = setting(2e-5, "Its learning rate (AdamW).")
        shots: int = setting(3, "Other rows shown before each forget row.")
        max_length: int | None = setting(512, "Longest row in tokens, as in the run; longer rows are cut.")
        per_device_eval_batch_size: int = setting(16, "Rows a forward pass.")
        seed: int = setting(0, "Seed of the choice of rows and of the bootstrap.")
        update_model: bool = setting(False, "Add the results to the report and card in the model's folder.")
        output_dir: str | None = setting(None, "Also write the report to this folder.")
        overwrite_output_dir: bool = setting(False, "Replace what is in the output folder.")

    if argv and not argv[0].startswith("-") and not argv[0].endswith((".yaml", ".yml")):
        argv = ["--model_name_or_path", *argv]
    (args,) = _parse("audit", [AuditArguments], argv)
    _join_processes()
    _hush()
    from hf_unlearn.files import check_output, replace_folder

    if args.output_dir:
        check_output(args.output_dir, args.overwrite_output_dir)
    settings = AuditSettings(
        args.relearn_rows, args.relearn_steps, args.relearn_learning_rate, shots=args.shots, seed=args.seed
    )
    report = attack(args, args.original, args.attacks, settings, args.per_device_eval_batch_size, args.max_length)
    if not is_main():
        return
    print(report.table() if report.metrics else "no attack could be run")
    for title, found in (("verdict", report.audit["verdicts"]), ("not run", report.audit["not_run"])):
        for name, words in found.items():
            print(f"{title}: {name}: {words}")
    if args.update_model:
        add_to_model(report, Path(args.model_name_or_path))
        print(f"added to the report and card in {args.model_name_or_path}")
    if args.output_dir:
        with replace_folder(args.output_dir, args.overwrite_output_dir) as folder:
            report.save(folder)
        print(f"saved to {args.output_dir}")


def _push(argv: list[str]) -> None:
    from hf_unlearn.hub import STATISTICS, publishable
    from hf_unlearn.publish import push_statistics, push_unlearned_model

    parser = argparse.ArgumentParser(
        prog="hf-unlearn push", description=COMMANDS["push"].capitalize() + ".", allow_abbrev=False,
        epilog="The token is read from HF_TOKEN or `hf auth login`; it is never a flag.",
    )  # fmt: skip
    parser.add_argument("folder", metavar="DIR", help="Output folder of a run, or folder of statistics.")
    parser.add_argument("repo_id", metavar="REPO", help="user/name on the Hub; made if it does not exist.")
    parser.add_argument("--private", action="store_true", default=None, help="Make the repository private.")
    parser.add_argument("--revision", help="Branch to push to; default: main.")
    parser.add_argument("--update", action="store_true", help="Also push into a repository that has other files.")
    parser.add_argument("--card_template", help="Render the model card anew from your own template.")
    parser.add_argument(
        "--publish_samples", action="store_true", help="Also publish prompts of forget rows and answers."
    )
    args = vars(parser.parse_args(argv))
    folder = Path(args.pop("folder"))
    if (folder / "statistics.json").is_file():
        del args["card_template"], args["publish_samples"]
        commit = push_statistics(folder, **args)
        published = publishable(folder, STATISTICS)
    else:
        commit = push_unlearned_model(folder, folder, **args)
        published = publishable(folder)
    stay = sorted({f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()} - set(published))
    print(f"published and checked ({len(published)} files): {commit.commit_url}")
    if stay:
        print(f"not published ({len(stay)} files): {', '.join(stay[:8])}" + (", ..." if len(stay) > 8 else ""))


def _parse(command: str, kinds: list[Any], argv: list[str]) -> tuple[Any, ...]:
    """Parse flags into dataclasses; a first argument that is a YAML file gives their defaults."""
    from transformers import HfArgumentParser

    from hf_unlearn.errors import SettingsError

    first = {"run": "[FILE.yaml] ", "evaluate": "[FILE.yaml] ", "audit": "[MODEL | FILE.yaml] "}.get(command, "")
    usage = f"hf-unlearn {command} {first}[options]"
    parser = HfArgumentParser(
        kinds, prog=f"hf-unlearn {command}", usage=usage, description=COMMANDS[command].capitalize() + ".",
        formatter_class=argparse.HelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    if argv and not argv[0].startswith("-"):
        parser.set_defaults(**_read_yaml(Path(argv[0]), {f.name for kind in kinds for f in fields(kind)}))
        argv = argv[1:]
    try:
        return parser.parse_args_into_dataclasses(argv)
    except ValueError as error:
        raise SettingsError(f"{command}: {str(error).splitlines()[0]}") from error


def _read_yaml(path: Path, known: set[str]) -> dict[str, Any]:
    from hf_unlearn.errors import SettingsError
    from hf_unlearn.files import read_yaml

    content = read_yaml(path)
    if unknown := sorted(set(content) - known):
        raise SettingsError(f"{path} has unknown settings: {', '.join(unknown)}; see hf-unlearn run --help")
    return content


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    from hf_unlearn.errors import SettingsError

    if value not in choices:
        raise SettingsError(f"unknown {name} {value!r}; choose from {', '.join(choices)}")


def _join_processes() -> None:
    """Meet the other processes of a distributed run, where training arguments have not done so."""
    from accelerate import PartialState

    PartialState()


def _hush(bars: bool = True) -> None:
    """Leave errors and, for what takes minutes, progress bars; the notes of the libraries would bury the table."""
    import warnings

    import datasets
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


def _show(reports: dict[str, Any], output_dir: str, metric: str) -> None:
    """Print one table, the samples side by side, and where everything is."""
    from hf_unlearn.report import side_by_side

    first = next(iter(reports.values()))
    print(f"\n{metric} by split (forgotten: {first.request['rows']} rows of {first.request['source']})\n")
    print(side_by_side(reports, metric))
    for name, report in reports.items():
        print(f"\n{name}: {report.method['stopped']}")
        for sample in report.samples:
            print(f"  Q      {sample['prompt']}\n  before {sample['answer']}\n  after  {sample['after']}\n")
    seconds = ", ".join(f"{phase} {value:.1f} s" for phase, value in first.timings.items())
    print(f"\ntime: {seconds}")
    print(f"checkpoint, report, card and plots: {output_dir}" + ("/<constraint>" if len(reports) > 1 else ""))


if __name__ == "__main__":
    sys.exit(main())
