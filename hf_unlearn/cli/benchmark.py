"""`hf-unlearn benchmark`: methods x constraints x seeds on one of the field's benchmarks."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from hf_unlearn.benchmark.registry import BENCHMARKS
from hf_unlearn.cli.answers import Answer
from hf_unlearn.cli.parsers import check_choice, make_run_parser, parse
from hf_unlearn.cli.setup import hush
from hf_unlearn.deletion.arguments import BenchmarkArguments
from hf_unlearn.errors import SettingsError
from hf_unlearn.trainer.config import UnlearningConfig

if TYPE_CHECKING:
    from transformers import HfArgumentParser


def parser() -> "HfArgumentParser":
    summaries = "; ".join(f"{name}: {benchmark.about}" for name, benchmark in BENCHMARKS.items())
    return make_run_parser(
        "benchmark",
        f"Compare methods, with and without constraints: {summaries}.",
        [BenchmarkArguments, UnlearningConfig],
        f"{' | '.join(BENCHMARKS)} [FILE.yaml] [options]",
    )


def main(argv: list[str]) -> Answer:
    if not argv or argv[0].startswith("-"):
        raise SettingsError(f"name a benchmark first: {', '.join(BENCHMARKS)}")
    name, *rest = argv
    check_choice("benchmark", name, list(BENCHMARKS))
    benchmark, flags = BENCHMARKS[name], parser()
    flags.set_defaults(**benchmark.defaults)
    args, config = parse(flags, rest)
    from hf_unlearn.benchmark.frontier import PLOT, save_frontier
    from hf_unlearn.benchmark.grid import run_grid
    from hf_unlearn.benchmark.results import JSON, TABLE, content, lines_of, markdown, write
    from hf_unlearn.core.processes import is_main

    hush()
    folder = Path(config.output_dir or f"benchmark-{name}")
    results = run_grid(args, config, folder)
    command = shlex.join(["hf-unlearn", "benchmark", *argv])
    if is_main():
        write(name, benchmark, results, command, folder)
        save_frontier(benchmark, lines_of(results), folder / PLOT)
    text = f"{markdown(name, benchmark, results, command)}\n{JSON}, {TABLE} and {PLOT} are in {folder}"
    return Answer(text, {"output_dir": str(folder), **content(name, benchmark, results, command)})
