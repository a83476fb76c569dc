"""`hf-unlearn run`: one deletion request, which may be the next of a series."""

from typing import TYPE_CHECKING

from hf_unlearn.cli.answers import Answer, reports_answer
from hf_unlearn.cli.parsers import make_run_parser, parse
from hf_unlearn.cli.setup import hush
from hf_unlearn.deletion.arguments import RunArguments
from hf_unlearn.trainer.config import UnlearningConfig

if TYPE_CHECKING:
    from transformers import HfArgumentParser


def parser() -> "HfArgumentParser":
    return make_run_parser("run", "Fulfil a deletion request.", [RunArguments, UnlearningConfig])


def main(argv: list[str]) -> Answer:
    args, config = parse(parser(), argv)
    from hf_unlearn.deletion.run import run_request

    hush()
    return reports_answer(run_request(args, config), config.output_dir or "unlearned", "answer_probability")
