"""`hf-unlearn collect`: statistics of a data set, once, when the model is trained."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_unlearn.cli.answers import Answer
from hf_unlearn.cli.parsers import make_run_parser, parse
from hf_unlearn.cli.setup import hush, join_processes
from hf_unlearn.core.settings import setting
from hf_unlearn.deletion.arguments import DataArguments
from hf_unlearn.statistics.options import CollectionOptions
from hf_unlearn.statistics.sketch import SKETCH_ABOVE, SKETCH_RANK

if TYPE_CHECKING:
    from transformers import HfArgumentParser


@dataclass
class CollectArguments(DataArguments):
    """Settings of collecting."""

    rows: str = setting("", "Split to collect on: name or name[start:stop].")
    fisher: bool = setting(False, "Also collect Fishers, for two-sided constraints and predicted KL.")
    max_length: int | None = setting(512, "Longest row in tokens, the same as in the run; longer rows are cut.")
    keep_statistics_on: str = setting("device", "Where to keep finished sums: device, cpu, disk or shards.")
    max_memory: str | None = setting(None, 'Make several passes, each with unfinished sums of this size ("4GB").')
    sketch_above: int = setting(SKETCH_ABOVE, "Keep a low-rank sketch of the statistics of more features than this.")
    sketch_rank: int = setting(SKETCH_RANK, "Rank of the sketches.")
    tolerance: float | None = setting(
        None, "Take rows in random order, and stop once doubling them moves less than this share of the energy."
    )
    output_dir: str = setting("statistics", "Folder to save the statistics to.")
    overwrite_output_dir: bool = setting(False, "Replace the contents of the output folder.")


def parser() -> "HfArgumentParser":
    return make_run_parser("collect", "Collect the statistics of a data set.", [CollectArguments])


def main(argv: list[str]) -> Answer:
    (args,) = parse(parser(), argv)
    from hf_unlearn.deletion.run import collect_split

    join_processes()
    hush()
    options = CollectionOptions(
        fisher=args.fisher,
        max_rows=args.max_rows,
        keep_on=args.keep_statistics_on,
        max_memory=args.max_memory,
        sketch_above=args.sketch_above,
        sketch_rank=args.sketch_rank,
        tolerance=args.tolerance,
    )
    statistics = collect_split(
        args, args.rows, options, args.output_dir, args.overwrite_output_dir, max_length=args.max_length
    )
    content = {
        "output_dir": args.output_dir,
        "rows": statistics.rows,
        "weights": statistics.weights,
        "data": statistics.data,
        "fisher": bool(statistics.fisher_sums),
        "layers": list(statistics.layers),
        "settings": dict(statistics.settings),
    }
    return Answer(f"{statistics.summary()}\nsaved to {args.output_dir}", content)
