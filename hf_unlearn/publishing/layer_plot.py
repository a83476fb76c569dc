"""The figure of the predicted drift of each layer."""

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hf_unlearn.core.text import is_finite
from hf_unlearn.evaluation.report import UnlearningReport
from hf_unlearn.publishing.plot_style import (
    LINE_STYLES,
    OTHER_COLOURS,
    label_curve_ends,
    new_panels,
    scale_from_zero_or_log,
)

MOST_BARS = 30


def drift_by_layer(report: UnlearningReport) -> Figure | None:
    """Draw the predicted relative drift of each layer's outputs on the retain set; None where there is none.

    Up to `MOST_BARS` layers are bars, more of them curves over depth. Layers of one type in one block (experts) are
    one point of a curve, their root mean square.
    """
    by_layer = (report.drift or {}).get("by_layer") or {}
    drifts = {name: float(value) for name, value in by_layer.items() if is_finite(value)}
    if not drifts:
        return None
    curves, outside_blocks = _by_type_and_block(drifts)
    deep = len(drifts) > MOST_BARS and any(len(values) > 1 for values in curves.values())
    figure = _depth_curves(curves, outside_blocks) if deep else _layer_bars(drifts)
    figure.suptitle("Predicted drift of the retain outputs, by layer", x=0.01, ha="left", fontsize=13)
    return figure


def _by_type_and_block(drifts: Mapping[str, float]) -> tuple[dict[str, dict[int, float]], dict[str, float]]:
    """Return the drift by layer type and block, and the drift of the layers that are in no block.

    `model.layers.3.mlp.up_proj` is of the type `model.layers.*.mlp.up_proj` and in block 3, its first integer.
    """
    squares: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    outside_blocks = {}
    for name, value in drifts.items():
        block = re.search(r"\d+", name)
        if block is None:
            outside_blocks[name] = value
        else:
            squares[re.sub(r"\d+", "*", name)][int(block[0])].append(value**2)
    curves = {
        pattern: {block: math.sqrt(sum(values) / len(values)) for block, values in sorted(blocks.items())}
        for pattern, blocks in squares.items()
    }
    return curves, outside_blocks


def _depth_curves(curves: Mapping[str, Mapping[int, float]], outside_blocks: Mapping[str, float]) -> Figure:
    """Draw a curve over the blocks for each layer type; layers outside blocks are points after the last block."""
    figure, (axes,) = new_panels(1, height=max(4.5, 0.2 * (len(curves) + len(outside_blocks)) + 1))
    last = max(block for blocks in curves.values() for block in blocks)
    all_curves = {**curves, **{name: {last + 1: value} for name, value in outside_blocks.items()}}
    names = dict(zip(all_curves, _shortest_endings(list(all_curves)), strict=True))
    labels = []
    for i, (pattern, blocks) in enumerate(all_curves.items()):
        colour = OTHER_COLOURS[i % len(OTHER_COLOURS)]
        style = LINE_STYLES[i // len(OTHER_COLOURS) % len(LINE_STYLES)]
        marker = "o" if len(blocks) <= 40 else None
        axes.plot(list(blocks), list(blocks.values()), style, color=colour, marker=marker, markersize=4, linewidth=1.6)
        labels.append((list(blocks.values())[-1], names[pattern], colour))
    scale_from_zero_or_log(axes, [value for blocks in all_curves.values() for value in blocks.values()])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="block", ylabel="relative drift")
    label_curve_ends(axes, labels)
    return figure


def _layer_bars(drifts: Mapping[str, float]) -> Figure:
    """Draw bars in the model's order from the top; only the `MOST_BARS` largest, and the axis label says so."""
    kept = sorted(drifts, key=lambda name: drifts[name], reverse=True)[:MOST_BARS]
    names = [name for name in drifts if name in kept]
    figure, (axes,) = new_panels(1, height=max(2.2, 1.2 + 0.24 * len(names)))
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
    """Shorten `model.layers.3.mlp.up_proj` to `3.mlp.up_proj`; keep full names if two would become equal."""
    short = [re.sub(r"^.*?(?=\d)", "", name) for name in names]
    return short if len(set(short)) == len(names) else list(names)


def _shortest_endings(names: Sequence[str]) -> list[str]:
    """Return as many last components of each name as it takes for no other name to end with them."""
    short = []
    for name in names:
        components = name.split(".")
        endings = [".".join(components[-count:]) for count in range(1, len(components) + 1)]
        unique = (end for end in endings if sum(f".{other}".endswith(f".{end}") for other in names) == 1)
        short.append(re.sub(r"\..*\*\.", " … ", next(unique, name).removeprefix("*.")))
    return short
