"""Figures of an `UnlearningReport`, as PNG files."""

import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from hf_unlearn.core.text import is_finite
from hf_unlearn.evaluation.metrics.classification import SMALLEST_ENTROPY, entropy_distance, log_entropies
from hf_unlearn.evaluation.report import MetricValue, UnlearningReport
from hf_unlearn.publishing.layer_plot import drift_by_layer
from hf_unlearn.publishing.plot_style import (
    DPI,
    MODEL_COLOURS,
    OTHER_COLOURS,
    SPLIT_COLOURS,
    SPLIT_NAMES,
    STYLE,
    TITLES,
    Points,
    in_order,
    label_curve_ends,
    new_panels,
    scale_from_zero_or_log,
    zoom_to_shares,
)

DRIFTS = {"retain_drift": "relative drift", "retain_kl": "KL (nats)", "leak": "leak of a step"}


def save_plots(report: UnlearningReport, folder: str | os.PathLike) -> list[Path]:
    """Write the figures of `PICTURES` that the report has data for, and return their paths.

    matplotlib's settings are restored after drawing.

    Args:
        report: A report; figures read its `metrics`, `history`, `entropies` and `drift`.
        folder: Where the PNG files go; created if it does not exist.

    Example:

    >>> import tempfile
    >>> from hf_unlearn.evaluation.report import UnlearningReport
    >>> report = UnlearningReport(drift={"by_layer": {"layers.0.mlp": 0.01, "layers.1.mlp": 0.02}})
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     [path.name for path in save_plots(report, folder)]
    ['drift_by_layer.png']
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    written = []
    with matplotlib.rc_context(STYLE):
        for name, (draw, _) in PICTURES.items():
            figure = draw(report)
            if figure is not None:
                figure.savefig(target / name, dpi=DPI, format="png")
                written.append(target / name)
    return written


def headline(report: UnlearningReport, measured: Iterable[str]) -> str | None:
    """Return the metric of `measured` to show first, or None.

    It is the one that early stopping used, or else accuracy for classifiers and answer probability for text.
    """
    order = ["accuracy", "answer_probability"]
    settings = report.settings
    if settings.get("forget_metric") == "probability" or re.search("generation|causal|lm", str(settings.get("task"))):
        order.reverse()
    names = set(measured)
    return next((name for name in order if name in names), None)


# Entropy histogram


def entropy_histogram(report: UnlearningReport) -> Figure | None:
    """Draw the distribution of the log output entropy on the forget set, a curve per model (figure of the PGU paper).

    The distances in the legend are 1-D Wasserstein distances between the log10 entropies, in decades.
    """
    values = {model: _log_entropies(report.entropies.get(model, ())) for model in MODEL_COLOURS}
    values = {model: logs for model, logs in values.items() if len(logs)}
    if not values:
        return None
    figure, (axes,) = new_panels(1)
    everything = np.concatenate(list(values.values()))
    count = int(np.clip(2 * math.sqrt(max(map(len, values.values()))), 16, 40))
    margin = max(0.02 * np.ptp(everything), 0.5 - np.ptp(everything) / 2)  # at least a decade, for its tick labels
    bins = (10 ** np.linspace(everything.min() - margin, everything.max() + margin, count + 1)).tolist()
    for model, logs in values.items():
        # a filled reference, a solid subject, a dashed start: distinguishable without colour too
        look: dict[str, Any] = {"fill": True, "alpha": 0.3} if model == "retrained" else {"fill": False}
        axes.hist(
            10**logs,
            bins=bins,
            weights=np.full(len(logs), 1 / len(logs)),
            histtype="stepfilled" if model == "retrained" else "step",
            color=MODEL_COLOURS[model],
            linewidth=2.2 if model == "unlearned" else 1.8,
            linestyle="--" if model == "original" else "-",
            label=_entropy_label(model, values),
            **look,
        )
    axes.set_xscale("log")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
    floor = " (smaller ones at 1e-7)" if 10 ** everything.min() <= SMALLEST_ENTROPY else ""
    axes.set(xlabel=f"output entropy, nats{floor}", ylabel="share of the forget set")
    rows = max(map(len, values.values()))
    figure.suptitle(f"How sure the models are of the {rows} forgotten rows", x=0.01, ha="left", fontsize=13)
    figure.legend(loc="outside lower left", ncols=1, fontsize=10.5)
    return figure


def _log_entropies(entropies: Iterable[float | None]) -> np.ndarray:
    return log_entropies(np.asarray([value for value in entropies if is_finite(value)], dtype=float))


def _entropy_label(model: str, values: Mapping[str, np.ndarray]) -> str:
    if model == "retrained" or "retrained" not in values:
        return model
    return f"{model}: {entropy_distance(values[model], values['retrained']):.2f} decades from retrained (Wasserstein)"


# Curves over the steps


def metrics_by_step(report: UnlearningReport) -> Figure | None:
    """Draw the headline metric of each split over the steps, and the predicted retain drift below it.

    A split's curve starts with the original model's value if the log has no evaluation at step 0, and ends with the
    model that was delivered, which may lie before the end of the last step. A dotted line is the mark of the run.
    """
    curves, drifts = _evaluation_curves(report), _drift_curves(report)
    end = delivered_step(report)
    if end is not None:
        if curves:
            for split, points in curves[1].items():
                curves[1][split] = _ended(points, end, _metric_value(report, curves[0], split, "unlearned"))
        ends = {"retain_drift": report.drift.get("relative"), "retain_kl": report.drift.get("kl")}
        drifts = {key: _ended(points, end, ends.get(key)) for key, points in drifts.items()}
    if not curves and not drifts:
        return None
    figure, panels = new_panels(bool(curves[1]) + bool(drifts) if curves else 1, sharex=True)
    remaining = list(panels)
    if curves:
        _draw_curves(remaining.pop(0), report, *curves)
    if drifts:
        _draw_drifts(remaining.pop(0), drifts)
    epochs = max((line.get("epoch") or 0 for line in report.history), default=0)
    panels[-1].set_xlabel("step" + (f" (epoch {epochs:.3g} at the end)" if epochs else ""))
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def delivered_step(report: UnlearningReport) -> float | None:
    """Return the step whose weights were delivered, if it lies before the last step, or None.

    A run that reached its mark goes back within its last step, and one that left a budget undoes its last step.

    >>> history = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.4}]
    >>> stopped = "forget probability 0.1000 reached what held-out rows had before, 0.1100 at step 1.25"
    >>> delivered_step(UnlearningReport(history=history, method={"stopped": stopped}))
    1.25
    """
    stopped = str(report.method.get("stopped") or "")
    found = re.search(r"step (\d+(?:\.\d+)?(?:e[+-]?\d+)?)", stopped)
    steps = [line["step"] for line in report.history if is_finite(line.get("step"))]
    if found is None or not steps:
        return None
    step = float(found[1])
    if "undone" in stopped:
        evaluated = "worse than before" in stopped  # that budget is looked at where the run is evaluated
        kept = [line["step"] for line in report.history if is_finite(line.get("step")) and line["step"] < step]
        if evaluated:
            kept = [line["step"] for line in report.history if line.get("step", step) < step and _is_evaluation(line)]
        return max(kept, default=0.0)
    return step if step < max(steps) else None


def _is_evaluation(line: Mapping[str, Any]) -> bool:
    return any(key.startswith("eval_") for key in line)


def _ended(points: Points, end: float, value: float | None) -> Points:
    """Return a curve up to step `end`, where it has this value; without a value, up to the last point before."""
    before = [(step, height) for step, height in points if step < end or (value is None and step <= end)]
    return [*before, (end, value)] if value is not None and is_finite(value) else before or points[:1]


def _metric_value(report: UnlearningReport, name: str, split: str, model: str) -> float | None:
    metric = report.get(name, split, model)
    return metric.value if metric is not None and is_finite(metric.value) else None


def _mark(report: UnlearningReport, name: str) -> float | None:
    """Return the value of a metric at which the run was to stop: its target, or what held-out rows had before."""
    settings = report.settings
    watched = {"accuracy": "accuracy", "probability": "answer_probability"}.get(str(settings.get("forget_metric")))
    if watched != name or settings.get("adversary_steps"):
        return None
    target = settings.get("forget_target")
    return target if is_finite(target) else _metric_value(report, name, "holdout", "original")


def _evaluation_curves(report: UnlearningReport) -> tuple[str, dict[str, Points]] | None:
    """Return the headline metric and its points (step, value) by split, from keys such as `eval_forget_accuracy`."""
    logged: dict[str, dict[str, dict[float, float]]] = defaultdict(lambda: defaultdict(dict))
    for line in report.history:
        for key, value in line.items():
            match = re.fullmatch(r"eval_(.+?)_(accuracy|(?:answer_)?probability)", key)
            if match and is_finite(value) and is_finite(line.get("step")):
                name = "accuracy" if match[2] == "accuracy" else "answer_probability"
                logged[name][match[1]][line["step"]] = value
    shown = headline(report, logged)
    if shown is None:
        return None
    for split, points in logged[shown].items():
        start = report.get(shown, split, "original")
        if 0 not in points and start is not None and is_finite(start.value):
            points[0] = start.value
    return shown, {split: sorted(logged[shown][split].items()) for split in in_order(logged[shown], SPLIT_COLOURS)}


def _drift_curves(report: UnlearningReport) -> dict[str, Points]:
    lines = [line for line in report.history if "loss" in line and is_finite(line.get("step"))]
    curves = {
        key: [(line["step"], line[key]) for line in lines if is_finite(line.get(key)) and line[key] > 0]
        for key in DRIFTS
    }
    return {key: points for key, points in curves.items() if points}


def _draw_curves(axes: Axes, report: UnlearningReport, name: str, curves: Mapping[str, Points]) -> None:
    labels = []
    others = iter(OTHER_COLOURS * len(curves))
    for split, points in curves.items():
        colour = SPLIT_COLOURS.get(split) or next(others)
        _draw_points(axes, points, colour, width=2.6 if split == "forget" else 1.8)
        labels.append((points[-1][1], SPLIT_NAMES.get(split, split), colour))
    level = report.get(name, "forget", "retrained")
    if level is not None and is_finite(level.value):
        axes.axhline(level.value, color=SPLIT_COLOURS["forget"], linestyle="--", linewidth=1.4, zorder=1)
        labels.append((level.value, "forget, retrained", SPLIT_COLOURS["forget"]))
    heights = [value for points in curves.values() for _, value in points] + [label[0] for label in labels]
    mark = _mark(report, name)
    if mark is not None:
        axes.axhline(mark, color="#222222", linestyle=":", linewidth=1.4, zorder=1)
        axes.set_title(f"dotted: the mark, {mark:.3g}", loc="right", fontsize=10)
        heights.append(mark)
    zoom_to_shares(axes, heights)
    axes.set_title(f"{TITLES[name]} while unlearning")
    label_curve_ends(axes, labels)


def _draw_drifts(axes: Axes, drifts: Mapping[str, Points]) -> None:
    """Draw the drift curves. A leak far below them, the usual case, is a note: its curve would squeeze the others."""
    drifts, labels = dict(drifts), []
    others = [value for key, points in drifts.items() if key != "leak" for _, value in points]
    leak = max((value for _, value in drifts.get("leak", [])), default=math.inf)
    if others and leak < min(others) / 10:
        del drifts["leak"]
        axes.set_title(f"largest leak of a step {leak:.1e}", loc="right", fontsize=10)
    for (key, points), colour in zip(drifts.items(), ("#0072B2", "#E69F00", "#8c8c8c"), strict=False):
        _draw_points(axes, points, colour, width=1.8)
        labels.append((points[-1][1], DRIFTS[key], colour))
    scale_from_zero_or_log(axes, [value for points in drifts.values() for _, value in points])
    axes.set_title("Predicted retain drift")
    label_curve_ends(axes, labels)


def _draw_points(axes: Axes, points: Points, colour: str, width: float) -> None:
    steps, values = zip(*points, strict=True)
    marker = "o" if len(points) <= 30 else None
    axes.plot(steps, values, color=colour, linewidth=width, marker=marker, markersize=5, zorder=width)


# Bars of the metrics


def metrics_bars(report: UnlearningReport) -> Figure | None:
    """Draw the headline metric, the share of content tokens that a model still prefers and the membership AUC, with 95%
    intervals: a group of bars per split, a bar per model.

    Other metrics are in the table of the card.
    """
    finite = [m for m in report.metrics if m.model in MODEL_COLOURS and is_finite(m.value)]
    names = [headline(report, {m.name for m in finite}), "content_known", "membership_auc"]
    by_name = {name: [m for m in finite if m.name == name] for name in names if name is not None}
    by_name = {name: metrics for name, metrics in by_name.items() if metrics}
    if not by_name:
        return None
    models = [model for model in MODEL_COLOURS if any(m.model == model for ms in by_name.values() for m in ms)]
    splits = {name: in_order({m.split: None for m in metrics}, SPLIT_COLOURS) for name, metrics in by_name.items()}
    width = float(np.clip(1.0 + sum(map(len, splits.values())) * (0.5 + 0.35 * len(models)), 7, 14))
    figure = Figure(figsize=(width, 4.5), layout="constrained")
    ratios = [max(len(names), 1.4) for names in splits.values()]
    panels = figure.subplots(1, len(by_name), squeeze=False, sharey=True, width_ratios=ratios)[0]
    for axes, (name, metrics) in zip(panels, by_name.items(), strict=True):
        _draw_bars(axes, name, splits[name], models, {(m.split, m.model): m for m in metrics})
    legend = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend([legend[model] for model in models], models, loc="outside upper left", ncols=len(models))
    return figure


def _draw_bars(
    axes: Axes, name: str, splits: Sequence[str], models: Sequence[str], metrics: Mapping[tuple[str, str], MetricValue]
) -> None:
    width = min(0.82 / len(models), 0.4)
    for i, model in enumerate(models):
        offset = (i - (len(models) - 1) / 2) * width
        for group, split in enumerate(splits):
            metric = metrics.get((split, model))
            if metric is not None:
                _draw_bar(axes, group + offset, metric, width)
    if name == "membership_auc":
        axes.axhline(0.5, color="#222222", linestyle=":", linewidth=1.4)
        axes.set_xlabel("0.5 = chance", fontsize=10)
    axes.set_xticks(range(len(splits)), [SPLIT_NAMES.get(split, split).replace("_", "\n") for split in splits])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, len(splits) - 0.4)
    axes.set_ylim(0, 1.12)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    axes.set_title(TITLES[name])


def _draw_bar(axes: Axes, place: float, metric: MetricValue, width: float) -> None:
    axes.bar(place, metric.value, width * 0.94, color=MODEL_COLOURS[metric.model], label=metric.model)
    top = metric.value
    if is_finite(metric.low) and is_finite(metric.high):
        low, high = float(metric.low or 0), float(metric.high or 0)
        axes.vlines(place, low, high, color="#222222", linewidth=1.3)
        top = max(top, high)
    axes.text(place, top + 0.012, f"{metric.value:.2f}", ha="center", va="bottom", fontsize=10)


PICTURES: dict[str, tuple[Callable[[UnlearningReport], Figure | None], str]] = {
    "metrics.png": (metrics_bars, "Metrics of each model with 95% intervals"),
    "metrics_by_step.png": (metrics_by_step, "Forgetting and predicted retain drift by step"),
    "entropy_histogram.png": (entropy_histogram, "Histogram of the log output entropy on the forget set"),
    "drift_by_layer.png": (drift_by_layer, "Predicted retain drift by layer"),
}
"""File name -> the function that draws it (None if its data are missing), and a description for the card."""
