"""What a command answers, and how the answer is printed."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_unlearn.errors import UnlearningError

if TYPE_CHECKING:
    from hf_unlearn.evaluation.report import UnlearningReport

WRONG_INPUT = 2
"""Exit code of a command that was refused because of its input."""
NO = 3
"""Exit code of a question whose answer is no."""
MISSED = 4
"""Exit code of a run that ended without reaching its mark; the output folder is complete."""
NOTHING_TO_FORGET = 5
"""Exit code of a run whose forget rows had reached the mark before the first step; the output folder is complete."""
OUTCOME_CODES = {"missed": MISSED, "nothing to forget": NOTHING_TO_FORGET}
"""Exit codes by the `status` of an outcome, the worst first; 0 for all others."""
ANSWER_CODE = "HF_UNLEARN_ANSWER_CODE"
"""Environment variable with the file for the exit code of an answer, for processes of a launcher, which would take any
code but 0 for a crash."""


@dataclass(frozen=True)
class Answer:
    """The result of a command. Progress goes to standard error or nowhere.

    Attributes:
        text: Text for standard output; None if the answer was printed already.
        content: The same as data for `--json`.
        code: Exit code.
    """

    text: str | None
    content: Mapping[str, object] | None
    code: int = 0


def run_and_print(command: Callable[[], Answer], as_json: bool, debug: bool) -> int:
    """Run a command, print its answer as text or JSON, and return the exit code.

    An `UnlearningError` is printed as one line, and the exit code is 2; with `debug` it is raised. Of several processes
    only the first prints.
    """
    prints = os.environ.get("RANK", "0") == "0"
    try:
        with redirect_stdout(sys.stderr) if as_json else nullcontext():  # libraries print, too
            answer = command()
        if prints and answer.text is not None:
            print(json.dumps(answer.content, allow_nan=False) if as_json else answer.text, flush=True)
        told = answer.code != 0 and _tell_launcher(answer.code)
        if "RANK" in os.environ:
            from hf_unlearn.core.processes import leave

            leave()
    except UnlearningError as error:
        if debug:
            raise
        if prints:
            print(f"hf-unlearn: {error}", file=sys.stderr)
            if as_json:
                print(json.dumps({"error": str(error)}))
        _tell_launcher(WRONG_INPUT)
        return WRONG_INPUT
    return 0 if told else answer.code


def _tell_launcher(code: int) -> bool:
    """Write the exit code of an answer where the launcher reads it; return whether there is a launcher."""
    file = os.environ.get(ANSWER_CODE)
    if file and os.environ.get("RANK", "0") == "0":
        Path(file).write_text(str(code), encoding="utf-8")
    return bool(file)


def reports_answer(reports: "Mapping[str, UnlearningReport]", output_dir: str, metric: str) -> Answer:
    """Return one table, the samples side by side, where the files are, and the outcome, which is also the exit code.

    Args:
        reports: Reports by name of the constraint.
        output_dir: The output folder.
        metric: Name of the metric in the table.
    """
    from hf_unlearn.evaluation.tables import cut_lines, outcome_lines, revealed_lines, side_by_side

    first = next(iter(reports.values()))
    source = str(first.request.get("source") or "").strip()
    count = first.request["rows"]
    forgotten = f"{count} row{'' if count == 1 else 's'}" + f" of {source}" * bool(source)
    lines = [f"\n{metric} by split (forgotten: {forgotten})\n"]
    lines.append(side_by_side(dict(reports), metric))
    lines += ["", *cut_lines(first)] if cut_lines(first) else []
    for name, report in reports.items():
        lines.append(f"\n{name}: {report.method['stopped']}")
        lines += [f"  {line}" for line in (*revealed_lines(report), *outcome_lines(report))]
        for sample in (*report.samples, *report.private_samples):
            lines.append(f"  Q      {sample['prompt']}\n  before {sample['answer']}\n  after  {sample['after']}")
            lines.append(f"  still says: {sample['still says']}\n" if "still says" in sample else "")
    lines += _series_lines(first)
    lines.append("\ntime: " + ", ".join(f"{phase} {value:.1f} s" for phase, value in first.timings.items()))
    several = "/<constraint>" if len(reports) > 1 else ""
    lines.append(f"checkpoint, report, card and plots: {output_dir}{several}")
    outcome, code = _worst_outcome(reports)
    content = {
        "output_dir": output_dir,
        "outcome": outcome,
        "reports": {name: report.content() for name, report in reports.items()},
    }
    return Answer("\n".join(lines), content, code)


def _worst_outcome(reports: "Mapping[str, UnlearningReport]") -> tuple[dict[str, object], int]:
    """Return the worst outcome of the runs, with the name of its constraint, and its exit code."""
    for status, code in OUTCOME_CODES.items():
        for name, report in reports.items():
            if report.outcome.get("status") == status:
                return {**report.outcome, "constraint": name}, code
    name, report = next(iter(reports.items()))
    return {**report.outcome, "constraint": name}, 0


def _series_lines(report: "UnlearningReport") -> list[str]:
    """Return what a series of requests has used and has left, and its warnings."""
    series = report.series
    if not series:
        return []
    room = f"room {series['room']['mean']:.2%}" if series["room"] else "room not measured"
    drift = series["drift_used"]
    budget = f" of {drift['budget']:.4f}" if drift["budget"] is not None else ""
    used = f"drift used by all requests {drift['relative']:.4f}{budget}"
    lines = [f"\nrequest {series['requests']} of its ledger: {room}, {used}, commitment {report.request['commitment']}"]
    return lines + [f"warning: {line}" for line in series["warnings"]]
