"""Plain-text tables of one report, and of several side by side."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hf_unlearn.core.text import align, as_text

if TYPE_CHECKING:
    from hf_unlearn.evaluation.report import MetricValue, UnlearningReport


def report_table(report: "UnlearningReport") -> str:
    """Return one line per metric and split and one column per model, with 95% intervals and n.

    Above the table is a line if greedy answers still give content away. Below it is one line for each undefined number,
    with the reason, one for each set with rows that were cut, one for each set whose content was measured, and the
    outcome of the run.
    """
    lines = [["metric", "split", *report.models, "n"]]
    for name, split in dict.fromkeys((metric.name, metric.split) for metric in report.metrics):
        metrics = [report.get(name, split, model) for model in report.models]
        n = next((metric.n for metric in metrics if metric), None)
        lines.append([name, split, *map(_cell, metrics), "-" if n is None else str(n)])
    reasons = dict.fromkeys(f"{m.name} on {m.split} is undefined: {m.reason}" for m in report.metrics if m.reason)
    below = [*reasons, *cut_lines(report), *content_lines(report), *outcome_lines(report)]
    return "\n".join([*revealed_lines(report), align(lines), *below])


def revealed_lines(report: "UnlearningReport") -> list[str]:
    """Return a line if greedy answers still give away what was to be forgotten, with counts and no text.

    >>> from hf_unlearn.evaluation import MetricValue, UnlearningReport
    >>> report = UnlearningReport([MetricValue("greedy_reveals", 0.5, "forget", "unlearned", n=4)])
    >>> revealed_lines(report)
    ['2 of 4 greedy answers still contain what was to be forgotten']
    """
    found = {model: report.get("greedy_reveals", "forget", model) for model in ("unlearned", "retrained")}
    counts = {name: round(m.value * m.n) for name, m in found.items() if m is not None and math.isfinite(m.value)}
    unlearned = found["unlearned"]
    if unlearned is None or not counts.get("unlearned"):
        return []
    still = f"{counts['unlearned']} of {unlearned.n} greedy answers still contain what was to be forgotten"
    reached = ", although the mark was reached" if report.outcome.get("status") == "reached" else ""
    beside = f" (retrained model: {counts['retrained']})" if "retrained" in counts else ""
    return [still + reached + beside]


def content_lines(report: "UnlearningReport") -> list[str]:
    """Return a line for each set with how many of its tokens are content, and by which rule.

    >>> from hf_unlearn.evaluation import UnlearningReport
    >>> content = {"rows": 2, "tokens": 30, "content_tokens": 9, "rules": {"secret": 2}}
    >>> content_lines(UnlearningReport(content_counts={"forget": content}))
    ['content of forget: 9 of 30 tokens (rule: secret)']
    """
    lines = []
    for name, found in report.content_counts.items():
        rules = list(found["rules"])
        shown = rules if len(rules) < 2 else [f"{rule} in {found['rules'][rule]} rows" for rule in rules]
        tokens = f"{found['content_tokens']} of {found['tokens']} tokens"
        lines.append(f"content of {name}: {tokens} (rule: {', '.join(shown)})")
    return lines


def cut_lines(report: "UnlearningReport") -> list[str]:
    """Return a line for each set of which rows were cut at `max_length`.

    >>> from hf_unlearn.evaluation import UnlearningReport
    >>> cut_lines(UnlearningReport(data={"forget": {"rows": 40, "rows_cut": 2, "tokens_cut": 30}}))
    ['2 of 40 forget rows were cut at max_length, 30 tokens were not read']
    """
    return [
        f"{count['rows_cut']} of {count['rows']} {name} rows were cut at max_length, {count['tokens_cut']} tokens were "
        "not read"
        for name, count in report.data.items()
        if count["rows_cut"]
    ]


def outcome_lines(report: "UnlearningReport") -> list[str]:
    """Return the outcome of a run and what to try next, or nothing if the report is not of a run.

    >>> from hf_unlearn.evaluation import UnlearningReport
    >>> report = UnlearningReport(outcome={"status": "missed", "summary": "missed by 0.1", "advice": "more epochs"})
    >>> outcome_lines(report)
    ['outcome: missed by 0.1', 'next: more epochs']
    """
    outcome = report.outcome
    return [f"outcome: {outcome['summary']}", f"next: {outcome['advice']}"] if outcome else []


def _cell(metric: "MetricValue | None") -> str:
    if metric is None:
        return "not measured"
    if not math.isfinite(metric.value):
        return "undefined"
    if metric.low is None or metric.high is None:
        return as_text(metric.value)
    return f"{as_text(metric.value)} [{as_text(metric.low)}, {as_text(metric.high)}]"


def forgotten_so_far(report: "UnlearningReport", metric: str, model: str = "unlearned") -> float | None:
    """Return the mean of a metric over the rows of this request and of all earlier ones that were evaluated again."""
    splits = [
        m
        for m in report.metrics
        if (m.name, m.model) == (metric, model) and (m.split == "forget" or m.split.startswith("forgotten_"))
    ]
    return sum(m.value * m.n for m in splits) / sum(m.n for m in splits) if splits else None


def side_by_side(reports: Mapping[str, "UnlearningReport"], metric: str) -> str:
    """Return one line per report, plus one for the original and the retrained model; one column per split of a metric.

    >>> from hf_unlearn.evaluation import MetricValue, UnlearningReport
    >>> values = [MetricValue("accuracy", v, "forget", m, n=9) for m, v in (("original", 0.9), ("unlearned", 0.1))]
    >>> report = UnlearningReport(values, method={"steps": 12}, timings={"unlearn": 3.2}, drift={})
    >>> print(side_by_side({"npo": report}, "accuracy"))
    model     forget  membership AUC  drift  steps  unlearning s
    --------  ------  --------------  -----  -----  ------------
    original  0.9000  -
    npo       0.1000  -               -      12     3.2
    """
    any_report = next(iter(reports.values()))
    splits = list(dict.fromkeys(m.split for m in any_report.metrics if m.name == metric))
    lines = [["model", *splits, "membership AUC", "drift", "steps", "unlearning s"]]
    lines.append([*_metric_cells("original", any_report, "original", metric, splits), "", "", ""])
    for name, report in reports.items():
        drift = as_text(report.drift["relative"], 4) if report.drift.get("by_layer") else "-"
        run = [drift, str(report.method["steps"]), f"{report.timings['unlearn']:.1f}"]
        lines.append([*_metric_cells(name, report, "unlearned", metric, splits), *run])
    if "retrained" in any_report.models:
        lines.append([*_metric_cells("retrained", any_report, "retrained", metric, splits), "", "", ""])
    return align(lines)


def _metric_cells(label: str, report: "UnlearningReport", model: str, metric: str, splits: Sequence[str]) -> list[str]:
    cells = [report.get(metric, split, model) for split in splits]
    attack = report.get("membership_auc", "forget", model)
    return [label, *(as_text(c.value, 4) if c else "-" for c in cells), as_text(attack.value) if attack else "-"]
