"""`hf-unlearn collect`: statistics of a data set, once, when the model is trained."""

from dataclasses import dataclass

from transformers import HfArgumentParser

from hf_unlearn.cli.common import Answer, hush, join_processes, make_run_parser, parse
from hf_unlearn.core.settings import setting
from hf_unlearn.deletion import run as runs
from hf_unlearn.deletion.arguments import DataArguments
from hf_unlearn.statistics.options import CollectionOptions
from hf_unlearn.statistics.sketch import SKETCH_ABOVE, SKETCH_RANK


@dataclass
class CollectArguments(DataArguments):
    rows: str = setting("", "Split to collect on: name or name[start:stop].")
    fisher: bool = setting(False, "Also collect Fishers, for the Kronecker constraint and predicted KL.")
    max_length: int | None = setting(512, "Longest row in tokens, the same as in the run; longer rows are cut.")
    keep_statistics_on: str = setting("device", "Where finished sums are kept: device, cpu, disk or shards.")
    max_memory: str | None = setting(None, 'Several passes, each with unfinished sums of this size, such as "4GB".')
    sketch_above: int = setting(SKETCH_ABOVE, "Keep a low-rank sketch of the statistics of more features than this.")
    sketch_rank: int = setting(SKETCH_RANK, "Rank of the sketches.")
    tolerance: float | None = setting(
        None, "Take rows in random order, and stop once doubling them moves less than this share of the energy."
    )
    output_dir: str = setting("statistics", "Where the statistics go.")
    overwrite_output_dir: bool = setting(False, "Replace what is in the output folder.")


def parser() -> HfArgumentParser:
    return make_run_parser("collect", "Collect the statistics of a data set.", [CollectArguments])


def main(argv: list[str]) -> Answer:
    (args,) = parse(parser(), argv)
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
    statistics = runs.collect(args, args.rows, options, args.output_dir, args.overwrite_output_dir, args.max_length)
    content = {
        "output_dir": args.output_dir, "rows": statistics.rows, "weights": statistics.weights, "data": statistics.data,
        "fisher": bool(statistics.fisher_sums), "layers": list(statistics.layers),
        "settings": dict(statistics.settings),
    }  # fmt: skip
    return Answer(f"{statistics.summary()}\nsaved to {args.output_dir}", content)
