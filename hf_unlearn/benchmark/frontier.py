"""The frontier of forgetting and utility: one line per method, through its constraints."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, TypedDict

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hf_unlearn.benchmark.registry import Benchmark, Column
from hf_unlearn.benchmark.results import Line, LineReports, mean, values
from hf_unlearn.publishing.plot_style import DPI, MODEL_COLOURS, STYLE

PLOT = "frontier.png"
MARKERS = "osD^vP*X"
FLOOR = 1e-12  # p-values reach 1e-200; smaller ones are drawn here
Point = tuple[float, float]


class MarkerStyle(TypedDict):
    """Keyword arguments of a matplotlib line that is one marker."""

    marker: str
    markersize: int
    linestyle: str


class Panel(NamedTuple):
    """One panel: the columns of its axes, and the mean over seeds of each line of the table."""

    across: Column
    up: Column
    points: Mapping[Line, Point]


def save_frontier(benchmark: Benchmark, lines: Mapping[Line, LineReports], path: Path) -> Path | None:
    """Draw the means over seeds, a panel for each pair of columns in `benchmark.frontiers`.

    Returns:
        `path`, or None if no pair has numbers; no file is written then.
    """
    panels = [panel for titles in benchmark.frontiers if (panel := _panel(benchmark, lines, titles)) is not None]
    if not panels:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.2 + 5.2 * len(panels), 4.8), layout="constrained")
        styles = _Styles([line for line in lines if any(line in panel.points for panel in panels)])
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _draw(axes, panel, styles)
        figure.legend(handles=styles.handles(), loc="outside right upper", fontsize=9)
        figure.savefig(path, dpi=DPI, format="png")
    return path


def _panel(benchmark: Benchmark, lines: Mapping[Line, LineReports], titles: tuple[str, str]) -> Panel | None:
    """Return the panel of two columns, or None if no unlearned model has numbers for both."""
    across, up = (next(column for column in benchmark.columns if column.title == title) for title in titles)
    points = {line: (mean(values(reports, across)), mean(values(reports, up))) for line, reports in lines.items()}
    points = {line: point for line, point in points.items() if all(map(math.isfinite, point))}
    return Panel(across, up, points) if any(constraint for _, constraint in points) else None


class _Styles:
    """A colour for each method, a marker for each constraint, a star for each reference model."""

    def __init__(self, lines: Iterable[Line]):
        lines = list(lines)
        self.methods = list(dict.fromkeys(method for method, constraint in lines if constraint))
        self.constraints = list(dict.fromkeys(constraint for _, constraint in lines if constraint))
        self.references = [method for method, constraint in lines if not constraint]
        self.palette = matplotlib.colormaps["tab10" if len(self.methods) <= 10 else "tab20"]

    def colour(self, method: str) -> tuple[float, float, float, float]:
        return self.palette(self.methods.index(method))

    def marker(self, constraint: str) -> MarkerStyle:
        marker = MARKERS[self.constraints.index(constraint) % len(MARKERS)]
        return {"marker": marker, "markersize": 7, "linestyle": ""}

    def star(self) -> MarkerStyle:
        return {"marker": "*", "markersize": 15, "linestyle": ""}

    def handles(self) -> list[Line2D]:
        return [
            *(Line2D([], [], color=self.colour(method), label=method) for method in self.methods),
            *(Line2D([], [], color="black", label=f"constraint {c}", **self.marker(c)) for c in self.constraints),
            *(Line2D([], [], color=MODEL_COLOURS[m], label=m, **self.star()) for m in self.references),
        ]


def _draw(axes: Axes, panel: Panel, styles: _Styles) -> None:
    heights = [up for _, up in panel.points.values()]
    log = min(heights) >= 0 and max(heights) > 1e3 * min(heights)
    points = {line: (across, max(up, FLOOR) if log else up) for line, (across, up) in panel.points.items()}
    for method in styles.methods:
        by_constraint = {c: points[method, c] for c in styles.constraints if (method, c) in points}
        if by_constraint:
            line = zip(*by_constraint.values(), strict=True)
            axes.plot(*line, color=styles.colour(method), linewidth=1.2, alpha=0.6)
        for constraint, (across, up) in by_constraint.items():
            axes.plot([across], [up], color=styles.colour(method), **styles.marker(constraint))
    for model in styles.references:
        if (model, "") in points:
            across, up = points[model, ""]
            axes.plot([across], [up], color=MODEL_COLOURS[model], **styles.star())
    if log:
        axes.set_yscale("log")
    axes.set_xlabel(f"{panel.across.title} ({panel.across.split})")
    axes.set_title(f"{panel.up.title} ({panel.up.split})")
