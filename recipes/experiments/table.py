"""Print a Markdown table of finished runs: one line per model, with the mean over runs and the range in brackets.

    python recipes/experiments/table.py --metric accuracy outputs/digits-0 outputs/digits-1 outputs/digits-2

Each folder is the output of one run, or of a run with several constraints (one subfolder per constraint).
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

from hf_unlearn import OutputError, UnlearningReport
from hf_unlearn.core import text
from hf_unlearn.evaluation import report as reporting


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--metric", default="answer_probability", help="accuracy, answer_probability, loss, ...")
    args = parser.parse_args()
    try:
        print(markdown(args.folders, args.metric))
    except OutputError as error:
        print(f"table.py: {error}", file=sys.stderr)
        return 2
    return 0


def markdown(folders: list[Path], metric: str) -> str:
    """Return the table; raises `OutputError` if a folder has no report."""
    reports: dict[str, list[UnlearningReport]] = defaultdict(list)
    for folder in folders:
        paths = sorted(folder.glob(f"*/{reporting.REPORT}")) or [folder / reporting.REPORT]
        for path in paths:
            report = UnlearningReport.load(path)
            reports[report.method["constraint"]].append(report)
    every = [report for group in reports.values() for report in group]
    splits = list(dict.fromkeys(m.split for m in every[0].metrics if m.name == metric))
    header = ["model", *splits, "membership AUC", "predicted drift", "steps", "unlearning, s"]
    lines = [_row("original", next(iter(reports.values())), "original", metric, splits)]
    lines += [_row(name, group, "unlearned", metric, splits) for name, group in reports.items()]
    if "retrained" in every[0].models:
        lines.append(_row("retrained", next(iter(reports.values())), "retrained", metric, splits))
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *lines])


def _row(label: str, group: list[UnlearningReport], model: str, metric: str, splits: list[str]) -> list[str]:
    cells = [text.spread([m.value for r in group if (m := r.get(metric, split, model))]) for split in splits]
    cells.append(text.spread([m.value for r in group if (m := r.get("membership_auc", "forget", model))]))
    if model != "unlearned":
        return [label, *cells, "", "", ""]
    drift = text.spread([r.drift["relative"] for r in group if r.drift.get("by_layer")], 4)
    steps = text.spread([float(r.method["steps"]) for r in group], 0)
    return [label, *cells, drift, steps, text.spread([r.timings["subtract"] + r.timings["unlearn"] for r in group], 1)]


if __name__ == "__main__":
    sys.exit(main())
