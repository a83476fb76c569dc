"""Colours, fonts and layout that all figures of the package share.

Figures are made with `matplotlib.figure.Figure` alone: pyplot keeps figures and a backend in global state, which would
interfere with a notebook's own. The colours are those of Okabe and Ito; models and splits have disjoint ones, so that a
colour has one meaning.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TypeAlias

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

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
TITLES = {
    "accuracy": "Accuracy",
    "answer_probability": "Answer probability",
    "content_known": "Content tokens above 0.5",
    "membership_auc": "Membership AUC",
}
SPLIT_NAMES = {"holdout": "held-out"}

Points: TypeAlias = list[tuple[float, float]]


def new_panels(count: int, height: float | None = None, sharex: bool = False) -> tuple[Figure, list[Axes]]:
    """Return a figure with `count` panels of full width, one above the other."""
    figure = Figure(figsize=(7, height or (4.5 if count == 1 else 2.9 * count)), layout="constrained")
    return figure, list(figure.subplots(count, 1, squeeze=False, sharex=sharex)[:, 0])


def scale_from_zero_or_log(axes: Axes, values: Sequence[float]) -> None:
    """Use a logarithmic axis if the positive values span more than a factor of 20, else a linear one from zero."""
    positive = [value for value in values if value > 0]
    if positive and max(positive) > 20 * min(positive):
        axes.set_yscale("log", nonpositive="mask")
        wide = max(positive) > 1000 * min(positive)
        axes.yaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0, 1.08 * max(values) or 1)


def zoom_to_shares(axes: Axes, values: Sequence[float]) -> None:
    """Set limits around shares in [0, 1], at least 0.2 apart, so that noise does not look like a change."""
    low, high = min(values), max(values)
    low, high = min(low, max(high - 0.2, 0)), max(high, min(low + 0.2, 1))
    low = 0 if low < 0.3 else low
    axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))


def label_curve_ends(axes: Axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Write each (value, text, colour) to the right of its curve; texts that would overlap are moved apart."""
    bottom, top = (axes.transScale.transform((1, limit))[1] for limit in axes.get_ylim())
    heights = [axes.transScale.transform((1, max(value, 1e-300)))[1] for value, _, _ in labels]
    places = spread_apart(
        [(height - bottom) / (top - bottom) for height in heights], gap=LABEL_PIXELS / axes.get_window_extent().height
    )
    for (_, text, colour), place in zip(labels, places, strict=True):
        axes.text(1.02, place, text, color=colour, transform=axes.transAxes, va="center", fontweight="bold")


def spread_apart(values: Sequence[float], gap: float, top: float = 1.0) -> list[float]:
    """Return places near the values, in their order, at least `gap` apart and at most `top`."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    up, down = list(values), list(values)
    for lower, upper in pairwise(order):
        up[upper] = max(up[upper], up[lower] + gap)
    for upper, lower in pairwise(reversed(order)):
        down[lower] = min(down[lower], down[upper] - gap)
    # pushing only up keeps the gap, pushing only down does too, and so does their mean, which stays centred
    places = [(a + b) / 2 for a, b in zip(up, down, strict=True)]
    for i in reversed(order):
        places[i] = min(places[i], top)
        top = places[i] - gap
    return places


def in_order(names: Iterable[str], first: Iterable[str]) -> list[str]:
    """Return `names` with those of `first` in front, in the order of `first`."""
    listed = list(names)
    return [name for name in first if name in listed] + [name for name in listed if name not in set(first)]
