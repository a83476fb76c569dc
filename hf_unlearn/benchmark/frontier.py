"""The forgetting-utility frontier: one line a method, through its constraints."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hf_unlearn.benchmark.registry import Benchmark, Column
from hf_unlearn.benchmark.results import Line, mean, values
from hf_unlearn.evaluation.report import UnlearningReport
from hf_unlearn.publishing.plot_style import DPI, MODEL_COLOURS, STYLE

PLOT = "frontier.png"
MARKERS = "osD^vP*X"
FLOOR = 1e-12  # p-values reach 1e-200; what is below is drawn here
Point = tuple[float, float]


def save_frontier(
    benchmark: Benchmark, lines: Mapping[Line, Sequence[tuple[UnlearningReport, str]]], path: Path
) -> Path | None:
    """Draw the means over seeds, a panel for each pair of columns; None, and no file, where no pair has numbers."""
    panels = []
    for titles in benchmark.frontiers:
        chosen = [next(c for c in benchmark.columns if c.title == title) for title in titles]
        points = {line: _point(found, chosen) for line, found in lines.items()}
        points = {line: point for line, point in points.items() if all(map(math.isfinite, point))}
        if any(constraint for _, constraint in points):
            panels.append((chosen, points))
    if not panels:
        return None
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.2 + 5.2 * len(panels), 4.8), layout="constrained")
        styles = _Styles([line for line in lines if any(line in points for _, points in panels)])
        for axes, (chosen, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _draw(axes, points, chosen, styles)
        figure.legend(handles=styles.handles(), loc="outside right upper", fontsize=9)
        figure.savefig(path, dpi=DPI, format="png")
    return path


class _Styles:
    """A colour for each method, a marker for each constraint, a star for each reference model."""

    def __init__(self, lines: Iterable[Line]):
        self.methods = list(dict.fromkeys(method for method, constraint in lines if constraint))
        self.constraints = list(dict.fromkeys(constraint for _, constraint in lines if constraint))
        self.references = [method for method, constraint in lines if not constraint]
        self.palette = matplotlib.colormaps["tab10" if len(self.methods) <= 10 else "tab20"]

    def colour(self, method: str) -> Any:
        return self.palette(self.methods.index(method))

    def marker(self, constraint: str) -> dict[str, Any]:
        marker = MARKERS[self.constraints.index(constraint) % len(MARKERS)]
        return {"marker": marker, "markersize": 7, "linestyle": ""}

    def star(self, model: str) -> dict[str, Any]:
        return {"marker": "*", "markersize": 15, "linestyle": "", "color": MODEL_COLOURS[model]}

    def handles(self) -> list[Line2D]:
        return [
            *(Line2D([], [], color=self.colour(method), label=method) for method in self.methods),
            *(Line2D([], [], color="black", label=f"constraint {c}", **self.marker(c)) for c in self.constraints),
            *(Line2D([], [], label=model, **self.star(model)) for model in self.references),
        ]


def _point(found: Sequence[tuple[UnlearningReport, str]], chosen: Sequence[Column]) -> Point:
    across, up = (mean(values(found, column)) for column in chosen)
    return across, up


def _draw(axes: Axes, points: Mapping[Line, Point], chosen: Sequence[Column], styles: _Styles) -> None:
    ups = [up for _, up in points.values()]
    log = min(ups) >= 0 and max(ups) > 1e3 * min(ups)
    places = {line: (across, max(up, FLOOR) if log else up) for line, (across, up) in points.items()}
    for method in styles.methods:
        own = {c: places[method, c] for c in styles.constraints if (method, c) in places}
        if own:
            axes.plot(*zip(*own.values(), strict=True), color=styles.colour(method), linewidth=1.2, alpha=0.6)
        for constraint, (across, up) in own.items():
            axes.plot([across], [up], color=styles.colour(method), **styles.marker(constraint))
    for model in styles.references:
        if (model, "") in places:
            across, up = places[model, ""]
            axes.plot([across], [up], **styles.star(model))
    if log:
        axes.set_yscale("log")
    axes.set_xlabel(f"{chosen[0].title} ({chosen[0].split})")
    axes.set_title(f"{chosen[1].title} ({chosen[1].split})")
