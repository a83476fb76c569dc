"""The preset `default`, untouched, against other losses whose learning rate was tuned on the very rows it is judged on.

    python recipes/tuned.py images recipes/default/digits_rows.yaml --output_dir outputs/tuned/digits_rows

The first two arguments are those of `hf-unlearn benchmark`; so are further options, such as `--seeds 0,1`. The cells of
the file itself are the default; beside them every loss of `--losses` runs under each of `--under` at each of `--rates`,
down to the same mark, as published: rows are not stopped one by one. Of its rates each loss is given the one that kept
most of the retain split in the mean over seeds, among those at which every seed reached the mark. Cells are files, so
that a grid that was cut off goes on. It prints a Markdown table, and writes it and a plot to the output folder.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_unlearn.benchmark import results
from hf_unlearn.benchmark.frontier import PLOT, save_frontier
from hf_unlearn.benchmark.grid import Results, run_grid
from hf_unlearn.benchmark.registry import BENCHMARKS, Column
from hf_unlearn.cli.benchmark import parser as benchmark_parser
from hf_unlearn.cli.parsers import check_choice, parse
from hf_unlearn.cli.setup import hush
from hf_unlearn.core.files import replace_file
from hf_unlearn.core.text import spread
from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.report import UnlearningReport

RATES = "2.5e-4,5e-4,1e-3,2e-3,4e-3"  # norms of a step, relative to the weights'
Found = list[tuple[UnlearningReport, str]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark")
    parser.add_argument("file", help="settings of the default's cells")
    parser.add_argument("--losses", default="grad_ascent,npo,simnpo,wga,satimp,undial,random_label,pgu,next_best,ce_u")
    parser.add_argument("--under", default="none,energy", help="constraints of the other losses")
    parser.add_argument("--rates", default=RATES, type=rates, help="their learning rates")
    parser.add_argument("--output_dir", type=Path, required=True)
    args, options = parser.parse_known_args()
    hush()
    try:
        check_choice("benchmark", args.benchmark, list(BENCHMARKS))
        print(compare(args, options))
    except UnlearningError as error:
        print(f"tuned.py: {error}", file=sys.stderr)
        return 2
    return 0


def rates(text: str) -> list[float]:
    """Numbers with commas; argparse says what is wrong with others."""
    return [float(rate) for rate in text.split(",")]


def compare(args: argparse.Namespace, options: Sequence[str]) -> str:
    """Run what is not finished yet; returns the table. Raises what `hf-unlearn benchmark` does."""
    benchmark = BENCHMARKS[args.benchmark]

    def run(*changes: str) -> Results:
        made = benchmark_parser()
        made.set_defaults(**benchmark.defaults)
        given = [args.file, "--attacks", "none", *options, "--output_dir", str(args.output_dir), *changes]
        return run_grid(*parse(made, given), args.output_dir)

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
    body = [_row(method, constraint, "", found, columns) for (method, constraint), found in lines.items()]
    best, failed = {}, []
    for line in dict.fromkeys((c.method, c.constraint) for o in others.values() for c in [*o.reports, *o.failed]):
        tried = {rate: results.lines_of(other).get(line, []) for rate, other in others.items()}
        tried = {rate: found for rate, found in tried.items() if found}
        reached = {rate: found for rate, found in tried.items() if all(_reached(report) for report, _ in found)}
        if not reached:
            seen = f"mark reached at none of {len(tried)} rates" if tried else _reason(others.values(), line)
            failed.append(f"- {line[0]}, {line[1]}: {seen}")
            continue
        rate = max(reached, key=lambda rate: results.mean(results.values(reached[rate], judged)))
        best[line] = reached[rate]
        body.append(_row(*line, f"{rate:g} of {len(reached)}", reached[rate], columns))
    head = ["loss", "constraint", "rate", *(column.title for column in columns), "steps"]
    text = results.table([head, *body]) + ("\n\nNot in the table:\n\n" + "\n".join(failed) if failed else "")
    save_frontier(benchmark, lines | best, args.output_dir / PLOT)
    with replace_file(args.output_dir / results.TABLE) as beside:
        beside.write_text(text + "\n", encoding="utf-8")
    return text


def _row(method: str, constraint: str, rate: str, found: Found, columns: Sequence[Column]) -> list[str]:
    steps = [float(report.method["steps"]) for report, model in found if model == "unlearned"]
    return [method, constraint, rate, *(spread(results.values(found, column)) for column in columns), spread(steps, 0)]


def _reached(report: UnlearningReport) -> bool:
    return bool(report.method["stopped"]) and "reached" in report.method["stopped"]


def _reason(tried: Sequence[Results], line: results.Line) -> str:
    return next(words for other in tried for c, words in other.failed.items() if (c.method, c.constraint) == line)


if __name__ == "__main__":
    sys.exit(main())
