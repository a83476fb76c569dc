"""`hf-unlearn run`: one deletion request, or one more of a series."""

from transformers import HfArgumentParser

from hf_unlearn.cli.common import Answer, hush, make_run_parser, parse, show
from hf_unlearn.deletion import run as runs
from hf_unlearn.deletion.arguments import RunArguments
from hf_unlearn.trainer.config import UnlearningConfig


def parser() -> HfArgumentParser:
    return make_run_parser("run", "Fulfil a deletion request.", [RunArguments, UnlearningConfig])


def main(argv: list[str]) -> Answer:
    args, config = parse(parser(), argv)
    hush()
    return show(runs.run_request(args, config), config.output_dir or "unlearned", "answer_probability")
