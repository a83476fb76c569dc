"""`UnlearningReport`: everything that was asked, done and measured, as one JSON file; card and plots read only it."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hf_unlearn.core.files import write_json
from hf_unlearn.core.text import align
from hf_unlearn.errors import OutputError

REPORT = "unlearning_report.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class MetricValue:
    """One measured number with its provenance.

    Attributes:
        name: `accuracy`, `answer_probability`, `loss`, `entropy` (both in nats), `membership_auc`, ...
        split: Which rows: `forget`, `retain`, `holdout`, ...
        model: `original`, `unlearned` or `retrained`.
        n: Number of rows behind `value`.
        low, high: Bounds of the 95% bootstrap interval.
        seed: Seed of the bootstrap.
        reason: Why there is no value, where it is undefined.
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


@dataclass
class UnlearningReport:
    """The record of one deletion request.

    Attributes:
        metrics: All measured numbers.
        request: What was to be forgotten: counts, source, date; never texts or ids.
        method: Loss, constraint, statistics, coverage, and why the run stopped.
        settings: Every hyper-parameter.
        versions: Package versions.
        hardware: One line.
        timings: Seconds by phase.
        history: The trainer's log lines (step, epoch, losses, drift, evaluation).
        drift: Predicted retain drift: `relative`, `kl`, `by_layer`.
        entropies: Output entropies in nats on the forget set, by model, for the histogram.
        audit: `verdicts` by metric and attacks `not_run`, with the reason.
        series: For a request in a series: how many, the room left, warnings; see `RequestSeries`.
        samples: Answers before and after on rows that may be shown (demo data only).
    """

    metrics: list[MetricValue] = field(default_factory=list)
    request: dict[str, Any] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    hardware: str = ""
    timings: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    drift: dict[str, Any] = field(default_factory=dict)
    entropies: dict[str, list[float]] = field(default_factory=dict)
    audit: dict[str, dict[str, str]] = field(default_factory=dict)
    series: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, str]] = field(default_factory=list)

    def get(self, name: str, split: str, model: str = "unlearned") -> MetricValue | None:
        """The metric of this name, or None where it was not measured."""
        return next((m for m in self.metrics if (m.name, m.split, m.model) == (name, split, model)), None)

    @property
    def models(self) -> list[str]:
        """Models that were measured, in the order original, unlearned, retrained."""
        seen = {metric.model for metric in self.metrics}
        return [model for model in ("original", "unlearned", "retrained") if model in seen]

    def table(self) -> str:
        """Plain-text table: a line per metric and split, a column per model, with 95% intervals and n."""
        rows = dict.fromkeys((metric.name, metric.split) for metric in self.metrics)
        lines = [["metric", "split", *self.models, "n"]]
        for name, split in rows:
            found = [self.get(name, split, model) for model in self.models]
            lines.append([name, split, *map(_cell, found), str(next(m.n for m in found if m))])
        reasons = dict.fromkeys(f"{m.name} on {m.split} is undefined: {m.reason}" for m in self.metrics if m.reason)
        return "\n".join([align(lines), *reasons])

    def save(self, folder: str | os.PathLike) -> Path:
        """Write `unlearning_report.json` into `folder`, atomically; NaN and infinities become null."""
        path = Path(folder) / REPORT
        write_json(path, self.content())
        return path

    def content(self) -> dict[str, Any]:
        """What `save` writes: values that JSON knows."""
        return plain({"format_version": FORMAT_VERSION, **asdict(self)})

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "UnlearningReport":
        """Read a report back from its folder or file; raises `OutputError` where there is none or it is newer."""
        path = Path(folder)
        path = path / REPORT if path.is_dir() else path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OutputError(f"{path} is not an unlearning report ({error})") from error
        if content.pop("format_version", 0) > FORMAT_VERSION:
            raise OutputError(f"{path} is of a newer format than {FORMAT_VERSION}: update hf-unlearn")
        known = {item.name for item in fields(cls)}
        content["metrics"] = [_metric(metric) for metric in content.get("metrics", [])]
        return cls(**{key: value for key, value in content.items() if key in known})


def _metric(content: Mapping[str, Any]) -> MetricValue:
    value = content["value"]
    return MetricValue(**{**content, "value": math.nan if value is None else value})


def _cell(metric: MetricValue | None) -> str:
    if metric is None:
        return "not measured"
    if not math.isfinite(metric.value):
        return "undefined"
    bounded = metric.low is not None and metric.high is not None
    return f"{metric.value:.3f}" + (f" [{metric.low:.3f}, {metric.high:.3f}]" if bounded else "")


def plain(value: Any) -> Any:
    """Only what JSON knows: numpy scalars to numbers, NaN and infinities to null, anything else to text."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
