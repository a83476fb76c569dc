"""`hf-unlearn evaluate`: evaluate a finished model."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_unlearn.cli.answers import Answer
from hf_unlearn.cli.parsers import make_run_parser, parse
from hf_unlearn.cli.setup import hush, join_processes
from hf_unlearn.core.settings import setting
from hf_unlearn.deletion.arguments import RunArguments

if TYPE_CHECKING:
    from transformers import HfArgumentParser


@dataclass
class EvaluateArguments(RunArguments):
    """Settings of an evaluation."""

    original: str | None = setting(None, "Folder or Hub id of the model before unlearning.")
    reference_model: str | None = setting(
        None, "Folder or Hub id of the model before it was fine-tuned on the forget rows; it tells what was learned."
    )
    max_length: int | None = setting(512, "Longest row in tokens, as in the run; longer rows are cut.")
    per_device_eval_batch_size: int = setting(16, "Rows in a forward pass.")
    seed: int = setting(0, "Seed of the bootstrap.")
    output_dir: str | None = setting(None, "Also write the report to this folder.")
    overwrite_output_dir: bool = setting(False, "Replace the contents of the output folder.")


def parser() -> "HfArgumentParser":
    return make_run_parser("evaluate", "Evaluate a finished model.", [EvaluateArguments])


def main(argv: list[str]) -> Answer:
    (args,) = parse(parser(), argv)
    from hf_unlearn.core.files import check_output, replace_folder
    from hf_unlearn.core.processes import is_main
    from hf_unlearn.deletion.run import evaluate_finished

    join_processes()
    hush()
    if args.output_dir:
        check_output(args.output_dir, args.overwrite_output_dir)
    report = evaluate_finished(
        args, args.original, args.per_device_eval_batch_size, args.seed, args.max_length, args.reference_model
    )
    text = report.table()
    if args.output_dir:
        if is_main():
            with replace_folder(args.output_dir, args.overwrite_output_dir) as folder:
                report.save(folder)
        text += f"\nsaved to {args.output_dir}"
    return Answer(text, {"output_dir": args.output_dir, "report": report.content()})
