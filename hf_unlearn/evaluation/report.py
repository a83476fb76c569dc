"""`UnlearningReport`: what was requested, done and measured, as one JSON file; card and plots read only this file."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hf_unlearn.core.files import write_json
from hf_unlearn.errors import OutputError
from hf_unlearn.evaluation.tables import report_table

Record = dict[str, Any]
"""A record of JSON values; others are converted by `plain`."""

REPORT = "unlearning_report.json"
FORMAT_VERSION = 1
PRIVATE = ("private_samples",)
"""Fields that are never written."""


@dataclass(frozen=True)
class MetricValue:
    """One measured number of a metric, with its provenance.

    >>> MetricValue("answer_probability", 0.06, "forget", "unlearned", n=20, low=0.04, high=0.08).value
    0.06

    Attributes:
        name: Name of the metric: `accuracy`, `answer_probability`, `loss`, `entropy` (both in nats),
            `membership_auc`, ...
        value: The number; NaN if it is undefined.
        split: The rows: `forget`, `retain`, `holdout`, ...
        model: `original`, `unlearned` or `retrained`.
        n: Number of rows behind `value`.
        low, high: Bounds of the 95% bootstrap interval, None if there is none.
        seed: Seed of the bootstrap.
        reason: Why the value is undefined, else empty.
    """

    name: str
    value: float
    split: str
    model: str
    n: int
    low: float | None = None
    high: float | None = None
    seed: int = 0
    reason: str = ""


@dataclass(repr=False)
class UnlearningReport:
    """The record of one deletion request.

    >>> report = UnlearningReport([MetricValue("accuracy", 0.5, "forget", "unlearned", n=20, low=0.3, high=0.7)])
    >>> report
    UnlearningReport(1 number of unlearned)
    >>> print(report.table())
    metric    split   unlearned             n
    --------  ------  --------------------  --
    accuracy  forget  0.500 [0.300, 0.700]  20
    >>> report.get("accuracy", "forget").value
    0.5

    Attributes:
        metrics: All measured numbers.
        request: What was to be forgotten: counts, source, date; never texts or ids.
        data: For each set its number of `rows`, of `rows_cut` at `max_length` and of `tokens_cut` off them.
        content_counts: For each split whose content was measured its number of `rows`, `tokens` and `content_tokens`,
            and the number of rows by the rule that found it (`rules`: `secret`, `reference`, `short context`).
        method: Loss, constraint, statistics, coverage, and why the run stopped.
        settings: Every hyper-parameter.
        versions: Package versions.
        hardware: Hardware of the run, in one line.
        timings: Seconds by phase.
        history: The trainer's log lines (step, epoch, losses, drift, evaluation).
        drift: Predicted retain drift: `relative`, `kl`, `by_layer`.
        outcome: Whether the run reached its mark: the fields of `trainer.outcome.UnlearningOutcome`, such as `status`,
            `mark`, `value` and `advice`; empty if there was no run.
        entropies: Output entropies in nats on the forget set, by model, for the histogram.
        audit: `verdicts` by metric, and the attacks `not_run` with the reason.
        series: For a request in a series: the number of requests, the room left, warnings; see `RequestSeries`.
        samples: Answers before and after unlearning, on rows that may be shown (demo data only).
        private_samples: The same for the terminal only: never saved, and never on a card.
    """

    metrics: list[MetricValue] = field(default_factory=list)
    request: Record = field(default_factory=dict)
    data: dict[str, dict[str, int]] = field(default_factory=dict)
    content_counts: dict[str, Record] = field(default_factory=dict)
    method: Record = field(default_factory=dict)
    settings: Record = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    hardware: str = ""
    timings: dict[str, float] = field(default_factory=dict)
    history: list[Record] = field(default_factory=list)
    drift: Record = field(default_factory=dict)
    outcome: Record = field(default_factory=dict)
    entropies: dict[str, list[float]] = field(default_factory=dict)
    audit: dict[str, dict[str, str]] = field(default_factory=dict)
    series: Record = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)
    private_samples: list[dict[str, str]] = field(default_factory=list)

    def __repr__(self) -> str:
        count, models = len(self.metrics), f" of {', '.join(self.models)}" if self.models else ""
        return f"{type(self).__name__}({count} number{'' if count == 1 else 's'}{models})"

    def get(self, name: str, split: str, model: str = "unlearned") -> MetricValue | None:
        """Return the number of this metric, split and model, or None if it was not measured."""
        return next((m for m in self.metrics if (m.name, m.split, m.model) == (name, split, model)), None)

    @property
    def models(self) -> list[str]:
        """The measured models, in the order original, unlearned, retrained."""
        measured = {metric.model for metric in self.metrics}
        return [model for model in ("original", "unlearned", "retrained") if model in measured]

    def table(self) -> str:
        """Return a plain-text table with 95% intervals and n: one line per metric and split, one column per model.

        Above it, if the model still gives away what was to be forgotten, is a line that says so. Below it are the
        reasons of undefined numbers, what counts as content, and the outcome of the run.
        """
        return report_table(self)

    def save(self, folder: str | os.PathLike) -> Path:
        """Write `unlearning_report.json` into `folder`, atomically; NaN and infinities become null."""
        path = Path(folder) / REPORT
        write_json(path, self.content())
        return path

    def content(self) -> Record:
        """Return what `save` writes: JSON values only."""
        content = {name: value for name, value in asdict(self).items() if name not in PRIVATE}
        return plain({"format_version": FORMAT_VERSION, **content})

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "UnlearningReport":
        """Read a report from its folder or file.

        Raises:
            OutputError: The file is not a report, or it has a newer format.
        """
        path = Path(folder)
        path = path / REPORT if path.is_dir() else path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OutputError(f"{path} is not an unlearning report ({error})") from error
        if content.pop("format_version", 0) > FORMAT_VERSION:
            raise OutputError(f"{path} has a newer format than {FORMAT_VERSION}: update hf-unlearn")
        known = {item.name for item in fields(cls)}
        content["metrics"] = [_metric_from_json(metric) for metric in content.get("metrics", [])]
        return cls(**{key: value for key, value in content.items() if key in known})


def _metric_from_json(content: Record) -> MetricValue:
    value = content["value"]
    return MetricValue(**{**content, "value": math.nan if value is None else value})


def plain(value: Any) -> Any:
    """Convert to JSON values: numpy scalars become numbers, NaN and infinities null, and unknown types text.

    >>> plain({"loss": float("nan"), "path": Path("a")})
    {'loss': None, 'path': 'a'}
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
