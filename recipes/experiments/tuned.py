"""Compare the unchanged preset `default` with other losses whose learning rate is tuned on the evaluated rows.

    python recipes/experiments/tuned.py images recipes/default/digits_rows.yaml --output_dir outputs/tuned/digits_rows

The first two arguments are those of `hf-unlearn benchmark`. Further options, such as `--seeds 0,1`, are passed on to
it. The cells of the file itself are the default. In addition every loss of `--losses` runs under each constraint of
`--under` at each rate of `--rates`, down to the same target and as published, i.e. without stopping rows one by one.
For each loss the table shows the rate that kept most of the retain split (mean over seeds), among the rates at which
every seed reached the target. Each cell is a file, so an interrupted grid resumes. The script prints a Markdown table
and writes the table and a plot to the output folder.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_unlearn import UnlearningError, UnlearningReport
from hf_unlearn.benchmark import BENCHMARKS, Column, Results, frontier, results, run_grid, save_frontier
from hf_unlearn.cli import benchmark as benchmark_command
from hf_unlearn.cli import parsers, setup
from hf_unlearn.core import files, text

RATES = "2.5e-4,5e-4,1e-3,2e-3,4e-3"  # norm of a step, relative to the norm of the weights
Group = list[tuple[UnlearningReport, str]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark")
    parser.add_argument("file", help="settings file of the default cells")
    parser.add_argument("--losses", default="grad_ascent,npo,simnpo,wga,satimp,undial,random_label,pgu,next_best,ce_u")
    parser.add_argument("--under", default="none,energy", help="constraints of the other losses")
    parser.add_argument("--rates", default=RATES, type=rates, help="their learning rates")
    parser.add_argument("--output_dir", type=Path, required=True)
    args, options = parser.parse_known_args()
    setup.hush()
    try:
        parsers.check_choice("benchmark", args.benchmark, list(BENCHMARKS))
        print(compare(args, options))
    except UnlearningError as error:
        print(f"tuned.py: {error}", file=sys.stderr)
        return 2
    return 0


def rates(numbers: str) -> list[float]:
    """Parse comma-separated numbers; argparse reports invalid ones."""
    return [float(rate) for rate in numbers.split(",")]


def compare(args: argparse.Namespace, options: Sequence[str]) -> str:
    """Run the cells that are not finished and return the table. Raises the errors of `hf-unlearn benchmark`."""
    benchmark = BENCHMARKS[args.benchmark]

    def run(*changes: str) -> Results:
        flags = benchmark_command.parser()
        flags.set_defaults(**benchmark.defaults)
        argv = [args.file, "--attacks", "none", *options, "--output_dir", str(args.output_dir), *changes]
        return run_grid(*parsers.parse(flags, argv), args.output_dir)

    default = run()
    published = ("--methods", args.losses, "--constraints", args.under, "--row_stopping", "False")
    others = {rate: run(*published, "--learning_rate", str(rate)) for rate in args.rates}
    columns = [
        column for column in benchmark.columns if results.values(results.lines_of(default)["original", ""], column)
    ]
    judged = next(
        column for column in benchmark.columns if column.title.startswith("retain ")
    )  # rates are chosen by it
    lines = results.lines_of(default)
    body = [_row(method, constraint, "", group, columns) for (method, constraint), group in lines.items()]
    best, failed = {}, []
    for line in dict.fromkeys((c.method, c.constraint) for o in others.values() for c in [*o.reports, *o.failed]):
        tried = {rate: results.lines_of(other).get(line, []) for rate, other in others.items()}
        tried = {rate: group for rate, group in tried.items() if group}
        reached = {rate: group for rate, group in tried.items() if all(_reached(report) for report, _ in group)}
        if not reached:
            seen = f"mark reached at none of {len(tried)} rates" if tried else _reason(others.values(), line)
            failed.append(f"- {line[0]}, {line[1]}: {seen}")
            continue
        rate = max(reached, key=lambda rate: results.mean(results.values(reached[rate], judged)))
        best[line] = reached[rate]
        body.append(_row(*line, f"{rate:g} of {len(reached)}", reached[rate], columns))
    head = ["loss", "constraint", "rate", *(column.title for column in columns), "steps"]
    table = results.table([head, *body]) + ("\n\nNot in the table:\n\n" + "\n".join(failed) if failed else "")
    save_frontier(benchmark, lines | best, args.output_dir / frontier.PLOT)
    with files.replace_file(args.output_dir / results.TABLE) as temporary:
        temporary.write_text(table + "\n", encoding="utf-8")
    return table


def _row(method: str, constraint: str, rate: str, group: Group, columns: Sequence[Column]) -> list[str]:
    steps = [float(report.method["steps"]) for report, model in group if model == "unlearned"]
    return [
        method,
        constraint,
        rate,
        *(text.spread(results.values(group, column)) for column in columns),
        text.spread(steps, 0),
    ]


def _reached(report: UnlearningReport) -> bool:
    return bool(report.method["stopped"]) and "reached" in report.method["stopped"]


def _reason(tried: Sequence[Results], line: results.Line) -> str:
    return next(words for other in tried for c, words in other.failed.items() if (c.method, c.constraint) == line)


if __name__ == "__main__":
    sys.exit(main())
