"""The figure of a series of requests: a metric and the predicted drift after each request, for several arms."""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hf_unlearn.core.text import is_finite
from hf_unlearn.evaluation.report import UnlearningReport
from hf_unlearn.evaluation.tables import forgotten_so_far
from hf_unlearn.publishing.plot_style import (
    DPI,
    LINE_STYLES,
    SPLIT_COLOURS,
    SPLIT_NAMES,
    STYLE,
    TITLES,
    label_curve_ends,
    new_panels,
    zoom_to_shares,
)


def save_series_plot(arms: Mapping[str, Sequence[UnlearningReport]], path: str | os.PathLike, metric: str) -> Path:
    """Draw a series of requests and write the figure to `path`.

    The upper panel shows `metric` on all rows forgotten so far, on retain rows and on held-out rows; the lower panel
    shows the drift that was used.

    Args:
        arms: The reports of each arm, one per request; an arm with a single report is drawn as a cross at the last
            request.
        path: The PNG file.
        metric: Name of a metric that all reports have.
    """
    with matplotlib.rc_context(STYLE):
        figure = series_figure(arms, metric)
        figure.savefig(path, dpi=DPI, format="png")
    return Path(path)


def series_figure(arms: Mapping[str, Sequence[UnlearningReport]], metric: str) -> Figure:
    """Return the figure of `save_series_plot`."""
    figure, (upper, lower) = new_panels(2, sharex=True)
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
            curve = [_split_value(report, metric, split) for report in reports]
            upper.plot(places, curve, color=colour, **look)
            values += [value for value in curve if is_finite(value)]
            if len(labels) < len(SPLIT_COLOURS):
                name = "forgotten so far" if split == "forget" else SPLIT_NAMES.get(split, split)
                labels.append((curve[-1], name, colour))
        used = [(r.series.get("drift_used") or r.drift)["relative"] for r in reports]
        lower.plot(places, used, color="#0072B2", label=arm, **look)
        drifts += used
    zoom_to_shares(upper, values)
    upper.set_title(f"{TITLES.get(metric, metric)} after each request")
    label_curve_ends(upper, labels)
    lower.set_ylim(0, 1.08 * max(drifts) or 1)
    lower.set_title("Predicted retain drift, added up")
    lower.legend()
    lower.set_xlabel("request")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def _split_value(report: UnlearningReport, metric: str, split: str) -> float:
    if split == "forget":
        mean = forgotten_so_far(report, metric)
        return math.nan if mean is None else mean
    measured = report.get(metric, split)
    return math.nan if measured is None else measured.value
