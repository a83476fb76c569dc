"""`hf-unlearn demo`: see it work, offline."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hf_unlearn.cli.answers import Answer, reports_answer
from hf_unlearn.cli.parsers import check_choice, make_settings_parser, parse
from hf_unlearn.cli.setup import hush
from hf_unlearn.constraints.registry import CONSTRAINTS
from hf_unlearn.core.settings import setting

if TYPE_CHECKING:
    from transformers import HfArgumentParser


@dataclass
class DemoArguments:
    """Settings of the demonstrations."""

    output_dir: str = setting("outputs/demo", "Folder for checkpoint, report, card and plots.")
    task: str = setting("digits", "digits (a vision transformer) or text (a chat model and five invented people).")
    forget: str | None = setting(
        None, "class:C or rows:N (digits, default class:3); person:P (text, default person:1)."
    )
    constraint: str | None = setting(
        None, f"{', '.join(CONSTRAINTS)} or all of them; default: that of UnlearningConfig."
    )
    seed: int = setting(0, "Seed of the splits and of training.")
    model: str | None = setting(None, "Folder or Hub id of the chat model of the text task.")
    cache_dir: str | None = setting(None, "Folder to keep the fine-tuned models of the text task in.")
    overwrite_output_dir: bool = setting(False, "Replace the contents of the output folder.")


def parser() -> "HfArgumentParser":
    return make_settings_parser("demo", "Forget something, offline, and see that it worked.", [DemoArguments])


def main(argv: list[str]) -> Answer:
    (args,) = parse(parser(), argv)
    check_choice("task", args.task, ("digits", "text"))
    if args.constraint is not None:
        check_choice("constraint", args.constraint, (*CONSTRAINTS, "all"))
    hush(bars=args.task == "text")
    options: dict[str, Any] = {"seed": args.seed, "overwrite": args.overwrite_output_dir}
    if args.task == "digits":
        from hf_unlearn.demo.digits import run_digits

        reports = run_digits(args.output_dir, args.forget or "class:3", args.constraint, **options)
        return replace(reports_answer(reports, args.output_dir, "accuracy"), code=0)
    from hf_unlearn.demo.people import DEFAULT_MODEL, run_people

    options |= {"model": args.model or DEFAULT_MODEL, "cache_dir": args.cache_dir}
    reports = run_people(args.output_dir, args.forget or "person:1", args.constraint, **options)
    return replace(reports_answer(reports, args.output_dir, "answer_probability"), code=0)
