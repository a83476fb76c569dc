"""Pictures of an `UnlearningReport`, as PNG files beside it.

Made from `matplotlib.figure.Figure` alone: pyplot keeps figures and a backend in global state, which would fight with
a notebook's own. Colours are Okabe and Ito's; models and splits have disjoint ones, so that a colour means one thing.
"""

import math
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from hf_unlearn.core.text import is_finite
from hf_unlearn.evaluation.metrics.classification import SMALLEST_ENTROPY, entropy_distance, log_entropies
from hf_unlearn.evaluation.report import MetricValue, UnlearningReport
from hf_unlearn.evaluation.tables import forgotten_so_far

DPI = 150
LABEL_PIXELS = 19  # height of a line of text at figure.dpi
STYLE = {
    "figure.dpi": 100,
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "legend.frameon": False,
}
MODEL_COLOURS = {"original": "#8c8c8c", "unlearned": "#D55E00", "retrained": "#0072B2"}
SPLIT_COLOURS = {"forget": "#CC79A7", "holdout": "#000000", "retain": "#009E73"}
OTHER_COLOURS = ("#E69F00", "#56B4E9", "#0072B2", "#D55E00", "#8c8c8c", "#CC79A7", "#009E73", "#000000")
LINE_STYLES = ("-", "--", ":", "-.")
TITLES = {"accuracy": "Accuracy", "answer_probability": "Answer probability", "membership_auc": "Membership AUC"}
SPLIT_NAMES = {"holdout": "held-out"}
DRIFTS = {"retain_drift": "relative drift", "retain_kl": "KL (nats)", "leak": "leak of a step"}
MOST_BARS = 30

Points: TypeAlias = list[tuple[float, float]]


def save_plots(report: UnlearningReport, folder: str | os.PathLike) -> list[Path]:
    """Write the `PICTURES` that the report has data for into `folder`, made if needed; returns their paths.

    matplotlib's settings are changed while drawing and restored after.
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


def save_series_plot(arms: Mapping[str, Sequence[UnlearningReport]], path: str | os.PathLike, metric: str) -> Path:
    """Draw requests in a row: `metric` on all rows forgotten so far, on retain and held-out rows, and the drift used.

    Args:
        arms: Reports by request of each way to go; one with a single report is drawn as a cross at the last request.
        path: The PNG file.
        metric: Name of a metric that all reports have.
    """
    with matplotlib.rc_context(STYLE):
        figure = series_figure(arms, metric)
        figure.savefig(path, dpi=DPI, format="png")
    return Path(path)


def series_figure(arms: Mapping[str, Sequence[UnlearningReport]], metric: str) -> Figure:
    """See `save_series_plot`."""
    figure, (upper, lower) = _panels(2, sharex=True)
    last = max(map(len, arms.values()))
    labels: list[tuple[float, str, str]] = []
    values: list[float] = []
    drifts: list[float] = []
    styles = dict(zip(arms, LINE_STYLES, strict=False))
    for arm, reports in arms.items():
        look: dict[str, Any] = {"linestyle": styles[arm], "marker": "o", "markersize": 4, "linewidth": 1.8}
        if len(reports) == 1:
            look = {"linestyle": "", "marker": "x", "markersize": 9, "markeredgewidth": 2.2}
        places = range(1, len(reports) + 1) if len(reports) > 1 else [last]
        for split, colour in SPLIT_COLOURS.items():
            found = [_split_value(report, metric, split) for report in reports]
            upper.plot(places, found, color=colour, **look)
            values += [value for value in found if is_finite(value)]
            if len(labels) < len(SPLIT_COLOURS):
                name = "forgotten so far" if split == "forget" else SPLIT_NAMES.get(split, split)
                labels.append((found[-1], name, colour))
        used = [(r.series.get("drift_used") or r.drift)["relative"] for r in reports]
        lower.plot(places, used, color="#0072B2", label=arm, **look)
        drifts += used
    _zoom(upper, values)
    upper.set_title(f"{TITLES.get(metric, metric)} after each request")
    _label_ends(upper, labels)
    lower.set_ylim(0, 1.08 * max(drifts) or 1)
    lower.set_title("Predicted retain drift, added up")
    lower.legend()
    lower.set_xlabel("request")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _split_value(report: UnlearningReport, metric: str, split: str) -> float:
    if split == "forget":
        known = forgotten_so_far(report, metric)
        return math.nan if known is None else known
    found = report.get(metric, split)
    return math.nan if found is None else found.value


def headline(report: UnlearningReport, measured: Iterable[str]) -> str | None:
    """The one of the `measured` metrics to look at first.

    It is the one that early stopping went by, or else accuracy for classifiers and answer probability for text.
    """
    order = ["accuracy", "answer_probability"]
    settings = report.settings
    if settings.get("forget_metric") == "probability" or re.search("generation|causal|lm", str(settings.get("task"))):
        order.reverse()
    names = set(measured)
    return next((name for name in order if name in names), None)


def entropy_histogram(report: UnlearningReport) -> Figure | None:
    """Distribution of the log output entropy on the forget set, a curve per model (the seed paper's picture).

    The distances are 1-D Wasserstein distances between the log10 entropies, so in decades.
    """
    values = {model: _log_entropies(report.entropies.get(model, ())) for model in MODEL_COLOURS}
    values = {model: logs for model, logs in values.items() if len(logs)}
    if not values:
        return None
    figure, (axes,) = _panels(1)
    everything = np.concatenate(list(values.values()))
    count = int(np.clip(2 * math.sqrt(max(map(len, values.values()))), 16, 40))
    margin = max(0.02 * np.ptp(everything), 0.5 - np.ptp(everything) / 2)  # at least a decade, for its tick labels
    bins = (10 ** np.linspace(everything.min() - margin, everything.max() + margin, count + 1)).tolist()
    for model, logs in values.items():
        # filled reference, solid subject, dashed start: told apart without colour too
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


def metrics_by_step(report: UnlearningReport) -> Figure | None:
    """The headline metric of each split over the steps, and below it the predicted retain drift.

    A split's curve starts with the original model's value where the log has no evaluation at step 0.
    """
    curves, drifts = _evaluation_curves(report), _drift_curves(report)
    if not curves and not drifts:
        return None
    figure, panels = _panels(bool(curves[1]) + bool(drifts) if curves else 1, sharex=True)
    remaining = list(panels)
    if curves:
        _draw_curves(remaining.pop(0), report, *curves)
    if drifts:
        _draw_drifts(remaining.pop(0), drifts)
    epochs = max((line.get("epoch") or 0 for line in report.history), default=0)
    panels[-1].set_xlabel("step" + (f" (epoch {epochs:.3g} at the end)" if epochs else ""))
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def drift_by_layer(report: UnlearningReport) -> Figure | None:
    """Predicted relative drift of each layer's outputs on the retain set: bars, or curves over depth if there are many.

    Layers of one kind in one block (experts) are drawn as one point, their root mean square.
    """
    drifts = _finite((report.drift or {}).get("by_layer") or {})
    if not drifts:
        return None
    blocks, single = _kinds(drifts)
    deep = len(drifts) > MOST_BARS and any(len(values) > 1 for values in blocks.values())
    figure = _depth_curves(blocks, single) if deep else _layer_bars(drifts)
    figure.suptitle("Predicted drift of the retain outputs, by layer", x=0.01, ha="left", fontsize=13)
    return figure


def metrics_bars(report: UnlearningReport) -> Figure | None:
    """The headline metric and the membership AUC with 95% intervals: a group of bars per split, a bar per model."""
    known = [m for m in report.metrics if m.model in MODEL_COLOURS and is_finite(m.value)]
    names = [headline(report, {m.name for m in known}), "membership_auc"]
    shown = {name: [m for m in known if m.name == name] for name in names if name is not None}
    shown = {name: found for name, found in shown.items() if found}
    if not shown:
        return None
    models = [model for model in MODEL_COLOURS if any(m.model == model for found in shown.values() for m in found)]
    splits = {name: _in_order({m.split: None for m in found}, SPLIT_COLOURS) for name, found in shown.items()}
    width = float(np.clip(1.0 + sum(map(len, splits.values())) * (0.5 + 0.35 * len(models)), 7, 14))
    figure = Figure(figsize=(width, 4.5), layout="constrained")
    ratios = [max(len(found), 1.4) for found in splits.values()]
    panels = figure.subplots(1, len(shown), squeeze=False, sharey=True, width_ratios=ratios)[0]
    for axes, (name, found) in zip(panels, shown.items(), strict=True):
        _draw_bars(axes, name, splits[name], models, {(m.split, m.model): m for m in found})
    legend = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend([legend[model] for model in models], models, loc="outside upper left", ncols=len(models))
    return figure


PICTURES: dict[str, tuple[Callable[[UnlearningReport], Figure | None], str]] = {
    "metrics.png": (metrics_bars, "Metrics of each model with 95% intervals"),
    "metrics_by_step.png": (metrics_by_step, "Forgetting and predicted retain drift by step"),
    "entropy_histogram.png": (entropy_histogram, "Histogram of the log output entropy on the forget set"),
    "drift_by_layer.png": (drift_by_layer, "Predicted retain drift by layer"),
}
"""File name -> what draws it (None where its data are missing), and its description for those who cannot see it."""


# Entropy


def _log_entropies(entropies: Iterable[float | None]) -> np.ndarray:
    return log_entropies(np.asarray([value for value in entropies if is_finite(value)], dtype=float))


def _entropy_label(model: str, values: Mapping[str, np.ndarray]) -> str:
    if model == "retrained" or "retrained" not in values:
        return model
    return f"{model}: {entropy_distance(values[model], values['retrained']):.2f} decades from retrained (Wasserstein)"


# By step


def _evaluation_curves(report: UnlearningReport) -> tuple[str, dict[str, Points]] | None:
    """The headline metric and its points (step, value) by split, from keys such as `eval_forget_accuracy`."""
    found: dict[str, dict[str, dict[float, float]]] = defaultdict(lambda: defaultdict(dict))
    for line in report.history:
        for key, value in line.items():
            match = re.fullmatch(r"eval_(.+?)_(accuracy|(?:answer_)?probability)", key)
            if match and is_finite(value) and is_finite(line.get("step")):
                name = "accuracy" if match[2] == "accuracy" else "answer_probability"
                found[name][match[1]][line["step"]] = value
    shown = headline(report, found)
    if shown is None:
        return None
    for split, points in found[shown].items():
        start = report.get(shown, split, "original")
        if 0 not in points and start is not None and is_finite(start.value):
            points[0] = start.value
    return shown, {split: sorted(found[shown][split].items()) for split in _in_order(found[shown], SPLIT_COLOURS)}


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
    _zoom(axes, [value for points in curves.values() for _, value in points] + [value for value, _, _ in labels])
    axes.set_title(f"{TITLES[name]} while unlearning")
    _label_ends(axes, labels)


def _draw_drifts(axes: Axes, drifts: Mapping[str, Points]) -> None:
    """A leak far below the drift, the usual case, becomes a note: its curve would squeeze the others."""
    drifts, labels = dict(drifts), []
    others = [value for key, points in drifts.items() if key != "leak" for _, value in points]
    leak = max((value for _, value in drifts.get("leak", [])), default=math.inf)
    if others and leak < min(others) / 10:
        del drifts["leak"]
        axes.set_title(f"largest leak of a step {leak:.1e}", loc="right", fontsize=10)
    for (key, points), colour in zip(drifts.items(), ("#0072B2", "#E69F00", "#8c8c8c"), strict=False):
        _draw_points(axes, points, colour, width=1.8)
        labels.append((points[-1][1], DRIFTS[key], colour))
    _scale(axes, [value for points in drifts.values() for _, value in points])
    axes.set_title("Predicted retain drift")
    _label_ends(axes, labels)


def _zoom(axes: Axes, values: Sequence[float]) -> None:
    """Limits around shares in [0, 1], never closer than 0.2 apart, so that noise does not look like a change."""
    low, high = min(values), max(values)
    low, high = min(low, max(high - 0.2, 0)), max(high, min(low + 0.2, 1))
    low = 0 if low < 0.3 else low
    axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))


def _draw_points(axes: Axes, points: Points, colour: str, width: float) -> None:
    steps, values = zip(*points, strict=True)
    marker = "o" if len(points) <= 30 else None
    axes.plot(steps, values, color=colour, linewidth=width, marker=marker, markersize=5, zorder=width)


# By layer


def _kinds(drifts: Mapping[str, float]) -> tuple[dict[str, dict[int, float]], dict[str, float]]:
    """Drift by kind of layer and block, and drift of the layers that are in no block.

    `model.layers.3.mlp.up_proj` is of the kind `model.layers.*.mlp.up_proj` and in block 3, its first integer.
    """
    squares: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    single = {}
    for name, value in drifts.items():
        block = re.search(r"\d+", name)
        if block is None:
            single[name] = value
        else:
            squares[re.sub(r"\d+", "*", name)][int(block[0])].append(value**2)
    kinds = {
        kind: {block: math.sqrt(sum(found) / len(found)) for block, found in sorted(blocks.items())}
        for kind, blocks in squares.items()
    }
    return kinds, single


def _depth_curves(kinds: Mapping[str, Mapping[int, float]], single: Mapping[str, float]) -> Figure:
    figure, (axes,) = _panels(1, height=max(4.5, 0.2 * (len(kinds) + len(single)) + 1))
    last = max(block for blocks in kinds.values() for block in blocks)
    names = dict(zip([*kinds, *single], _shortest_endings([*kinds, *single]), strict=True))
    labels = []
    for i, (kind, blocks) in enumerate(
        [*kinds.items(), *((name, {last + 1: value}) for name, value in single.items())]
    ):
        colour = OTHER_COLOURS[i % len(OTHER_COLOURS)]
        style = LINE_STYLES[i // len(OTHER_COLOURS) % len(LINE_STYLES)]
        marker = "o" if len(blocks) <= 40 else None
        axes.plot(list(blocks), list(blocks.values()), style, color=colour, marker=marker, markersize=4, linewidth=1.6)
        labels.append((list(blocks.values())[-1], names[kind], colour))
    _scale(axes, [value for blocks in kinds.values() for value in blocks.values()] + list(single.values()))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="block", ylabel="relative drift")
    _label_ends(axes, labels)
    return figure


def _layer_bars(drifts: Mapping[str, float]) -> Figure:
    """Bars in the model's order from the top; of more than `MOST_BARS` layers the largest are kept, and it is said."""
    kept = sorted(drifts, key=lambda name: drifts[name], reverse=True)[:MOST_BARS]
    names = [name for name in drifts if name in kept]
    figure, (axes,) = _panels(1, height=max(2.2, 1.2 + 0.24 * len(names)))
    bars = axes.barh(_without_prefix(names), [drifts[name] for name in names], color="#0072B2", height=0.7)
    axes.bar_label(bars, fmt="%#.2g", padding=4, fontsize=10)
    axes.tick_params(axis="y", length=0, labelsize=10)
    axes.spines["bottom"].set_visible(False)
    axes.grid(False)
    axes.set_xticks([])  # each bar says its own value
    axes.set_xlabel(
        "relative drift" + (f", {MOST_BARS} largest of {len(drifts)} layers" if names != list(drifts) else "")
    )
    axes.margins(x=0.12, y=0.01)
    axes.invert_yaxis()
    return figure


def _without_prefix(names: Sequence[str]) -> list[str]:
    """`model.layers.3.mlp.up_proj` -> `3.mlp.up_proj`; full names where that would make two of them equal."""
    short = [re.sub(r"^.*?(?=\d)", "", name) for name in names]
    return short if len(set(short)) == len(names) else list(names)


def _shortest_endings(names: Sequence[str]) -> list[str]:
    """Of each name as many last components as no other name ends with."""
    short = []
    for name in names:
        parts = name.split(".")
        endings = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        unique = (end for end in endings if sum(f".{other}".endswith(f".{end}") for other in names) == 1)
        short.append(re.sub(r"\..*\*\.", " … ", next(unique, name).removeprefix("*.")))
    return short


# Bars of the metrics


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


# Shared


def _panels(count: int, height: float | None = None, sharex: bool = False) -> tuple[Figure, list[Axes]]:
    """Panels of full width, one above the other."""
    figure = Figure(figsize=(7, height or (4.5 if count == 1 else 2.9 * count)), layout="constrained")
    return figure, list(figure.subplots(count, 1, squeeze=False, sharex=sharex)[:, 0])


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """Logarithmic where positive values span more than a factor of 20, else linear from zero."""
    positive = [value for value in values if value > 0]
    if positive and max(positive) > 20 * min(positive):
        axes.set_yscale("log", nonpositive="mask")
        wide = max(positive) > 1000 * min(positive)
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, 1.08 * max(values) or 1)


def _label_ends(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Write each (value, text, colour) to the right of its curve, moved apart where they would overlap."""
    bottom, top = (axes.transScale.transform((1, limit))[1] for limit in axes.get_ylim())
    heights = [axes.transScale.transform((1, max(value, 1e-300)))[1] for value, _, _ in labels]
    places = _spread(
        [(height - bottom) / (top - bottom) for height in heights], gap=LABEL_PIXELS / axes.get_window_extent().height
    )
    for (_, text, colour), place in zip(labels, places, strict=True):
        axes.text(1.02, place, text, color=colour, transform=axes.transAxes, va="center", fontweight="bold")


def _spread(values: Sequence[float], gap: float, top: float = 1.0) -> list[float]:
    """Places at least `gap` apart and at most `top`, in the order of the values and near to them."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    up, down = list(values), list(values)
    for lower, upper in pairwise(order):
        up[upper] = max(up[upper], up[lower] + gap)
    for upper, lower in pairwise(reversed(order)):
        down[lower] = min(down[lower], down[upper] - gap)
    # pushing only up keeps the gap, pushing only down does, and so does their mean, which stays centred
    places = [(a + b) / 2 for a, b in zip(up, down, strict=True)]
    for i in reversed(order):
        places[i] = min(places[i], top)
        top = places[i] - gap
    return places


def _in_order(names: Iterable[str], first: Iterable[str]) -> list[str]:
    found = list(names)
    return [name for name in first if name in found] + [name for name in found if name not in set(first)]


def _finite(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if is_finite(value)}
