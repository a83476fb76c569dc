"""`hf-unlearn benchmark`: methods x constraints x seeds on one of the field's benchmarks."""

import shlex
from pathlib import Path

from transformers import HfArgumentParser

from hf_unlearn.benchmark.registry import BENCHMARKS
from hf_unlearn.cli.common import Answer, check_choice, hush, make_run_parser, parse
from hf_unlearn.core.processes import is_main
from hf_unlearn.deletion.arguments import BenchmarkArguments
from hf_unlearn.errors import SettingsError
from hf_unlearn.trainer.config import UnlearningConfig


def parser() -> HfArgumentParser:
    about = "Compare methods, with and without constraints: " + "; ".join(
        f"{n}: {b.about}" for n, b in BENCHMARKS.items()
    )
    return make_run_parser(
        "benchmark",
        f"{about}.",
        [BenchmarkArguments, UnlearningConfig],
        f"{' | '.join(BENCHMARKS)} [FILE.yaml] [options]",
    )


def main(argv: list[str]) -> Answer:
    made, argv = parser(), list(argv)
    if not argv or argv[0].startswith("-"):
        made.parse_known_args(argv)  # --help
        raise SettingsError(f"name a benchmark first: {', '.join(BENCHMARKS)}")
    name, *rest = argv
    check_choice("benchmark", name, list(BENCHMARKS))
    benchmark = BENCHMARKS[name]
    made.set_defaults(**benchmark.defaults)
    args, config = parse(made, rest)
    hush()
    from hf_unlearn.benchmark import results
    from hf_unlearn.benchmark.frontier import PLOT, save_frontier
    from hf_unlearn.benchmark.grid import run_grid

    folder = Path(config.output_dir or f"benchmark-{name}")
    found = run_grid(args, config, folder)
    command = shlex.join(["hf-unlearn", "benchmark", *argv])
    if is_main():
        results.write(name, benchmark, found, command, folder)
        save_frontier(benchmark, results.lines_of(found), folder / PLOT)
    text = results.markdown(name, benchmark, found, command)
    where = f"{text}\n{results.JSON}, {results.TABLE} and {PLOT} are in {folder}"
    return Answer(where, {"output_dir": str(folder), **results.content(name, benchmark, found, command)})
