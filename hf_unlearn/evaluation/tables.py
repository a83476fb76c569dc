"""Plain-text tables of several reports side by side."""

from collections.abc import Mapping, Sequence

from hf_unlearn.core.text import align
from hf_unlearn.evaluation.report import UnlearningReport


def forgotten_so_far(report: UnlearningReport, metric: str, model: str = "unlearned") -> float | None:
    """Mean of a metric over the rows of this request and of all earlier ones that were tested again."""
    sets = [
        m for m in report.metrics
        if (m.name, m.model) == (metric, model) and (m.split == "forget" or m.split.startswith("forgotten_"))
    ]  # fmt: skip
    return sum(m.value * m.n for m in sets) / sum(m.n for m in sets) if sets else None


def side_by_side(reports: Mapping[str, UnlearningReport], metric: str) -> str:
    """One line per report (and for the original and the retrained model), a column per split of `metric`."""
    any_report = next(iter(reports.values()))
    splits = list(dict.fromkeys(m.split for m in any_report.metrics if m.name == metric))
    rows = [["model", *splits, "membership AUC", "drift", "steps", "unlearning s"]]
    rows.append(_summary_row("original", any_report, "original", metric, splits))
    for name, report in reports.items():
        row = _summary_row(name, report, "unlearned", metric, splits)
        row[-3] = f"{report.drift['relative']:.4f}" if report.drift.get("by_layer") else "-"
        row[-2], row[-1] = str(report.method["steps"]), f"{report.timings['unlearn']:.1f}"
        rows.append(row)
    if "retrained" in any_report.models:
        rows.append(_summary_row("retrained", any_report, "retrained", metric, splits))
    return align(rows)


def _summary_row(label: str, report: UnlearningReport, model: str, metric: str, splits: Sequence[str]) -> list[str]:
    cells = [report.get(metric, split, model) for split in splits]
    attack = report.get("membership_auc", "forget", model)
    return [
        label,
        *(f"{c.value:.4f}" if c else "-" for c in cells),
        f"{attack.value:.3f}" if attack else "-",
        "",
        "",
        "",
    ]
