"""Laws of the plots: a figure is written if and only if its data exist, shows the report's numbers, and changes no
global state.

Each law has a negative control: the same check on a report or a layout for which it must not hold.
"""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hf_unlearn.evaluation.report import MetricValue, UnlearningReport
from hf_unlearn.publishing import layer_plot, plot_style, plots, series_plot

PNG = b"\x89PNG\r\n\x1a\n"


def entropies(seed: int, centre: float, n: int = 40) -> list[float]:
    return np.exp(np.random.default_rng(seed).normal(centre, 0.5, n)).tolist()


def make_report(retrained: bool = True, layers: int = 12) -> UnlearningReport:
    models = {"original": 1.0, "unlearned": 0.87, **({"retrained": 0.88} if retrained else {})}
    metrics = [
        MetricValue("accuracy", value - 0.01 * i, split, model, 50, value - 0.05, min(value + 0.05, 1))
        for model, value in models.items()
        for i, split in enumerate(("forget", "retain", "holdout"))
    ]
    history: list[dict] = []
    for step in range(1, 5):
        drift = {"retain_drift": 1e-3 * step, "retain_kl": 1e-5 * step, "leak": 2e-7}
        history.append({"loss": 1.0, "step": step, "epoch": step / 2, **drift})
        history.append({"eval_forget_accuracy": 1 - 0.03 * step, "step": step, "epoch": step / 2})
        history.append({"eval_holdout_accuracy": 0.88, "step": step, "epoch": step / 2})
    kinds = ("attn.q_proj", "attn.v_proj", "mlp.down_proj")
    by_layer = {f"model.layers.{i}.{kind}": 0.01 * (i + 1) for i in range(layers // 3) for kind in kinds}
    return UnlearningReport(
        metrics=metrics,
        history=history,
        drift={"relative": 0.02, "kl": 1e-4, "by_layer": by_layer},
        entropies={model: entropies(i, -3.0 * i) for i, model in enumerate(models)},
    )


def written(report: UnlearningReport, folder: Path) -> set[str]:
    paths = plots.save_plots(report, folder)
    assert sorted(paths) == sorted(folder.iterdir())
    assert all(path.read_bytes().startswith(PNG) for path in paths)
    return {path.name for path in paths}


def drawn(figure: Figure | None) -> Figure:
    assert figure is not None
    FigureCanvasAgg(figure).draw()
    return figure


def test_a_figure_is_written_if_and_only_if_its_data_exist(tmp_path: Path) -> None:
    report = make_report()
    assert written(report, tmp_path / "new" / "plots") == set(plots.PICTURES)
    lacking = {
        "metrics.png": replace(report, metrics=[]),
        "metrics_by_step.png": replace(report, history=[]),
        "entropy_histogram.png": replace(report, entropies={}),
        "drift_by_layer.png": replace(report, drift={}),
    }
    for name, without in lacking.items():
        assert plots.PICTURES[name][0](without) is None
        assert all(draw(without) is not None for other, (draw, _) in plots.PICTURES.items() if other != name)
    assert written(UnlearningReport(), tmp_path / "empty") == set()


def test_undefined_values_are_left_out(tmp_path: Path) -> None:
    report = make_report(retrained=False)
    nan: list = [float("nan"), None, 0.5, 0.0]
    report.entropies = {"original": nan, "unlearned": [], "retrained": [math.nan]}
    report.metrics = [replace(report.metrics[0], value=value) for value in nan]
    report.drift = {"relative": math.nan, "kl": None, "by_layer": {"a": math.nan, "b": None, "c": 0.1}}
    report.history = [{"loss": math.nan, "step": 1, "retain_drift": math.nan, "retain_kl": 0.0, "eval_loss": None}]
    assert written(report, tmp_path) == set(plots.PICTURES) - {"metrics_by_step.png"}
    histogram = plots.entropy_histogram(report)
    assert histogram is not None and "2 forgotten rows" in histogram.get_suptitle()
    assert sum(histogram.axes[0].patches[0].get_xy()[:, 1] > 0) > 0 and len(histogram.axes[0].patches) == 1


def test_settings_of_matplotlib_are_restored_and_pyplot_is_not_loaded(tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    plots.save_plots(replace(make_report(), drift={}, entropies={}, history=[]), tmp_path)
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context(plot_style.STYLE):
        assert dict(matplotlib.rcParams) != before  # negative control: the style changes them
    loaded = "print('matplotlib.pyplot' in sys.modules, 'matplotlib' in sys.modules)"
    code = f"import sys, hf_unlearn.publishing.plots; {loaded}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_the_histogram_shows_the_distance_of_each_model_to_the_retrained_one() -> None:
    report = make_report()
    figure = plots.entropy_histogram(report)
    assert figure is not None
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    # for equally many values on both sides, the distance is the mean gap between the sorted values
    logs = {model: np.sort(np.log10(values)) for model, values in report.entropies.items()}
    for label, model in zip(labels, ("original", "unlearned"), strict=False):
        assert f"{np.abs(logs[model] - logs['retrained']).mean():.2f} decades" in label
    without = plots.entropy_histogram(make_report(retrained=False))
    assert without is not None
    assert [text.get_text() for text in without.legends[0].get_texts()] == ["original", "unlearned"]


def test_curves_start_at_the_original_model_and_end_at_the_last_evaluation() -> None:
    figure = plots.metrics_by_step(make_report())
    assert figure is not None
    curves, drifts = figure.axes
    forget = next(line for line in curves.lines if line.get_color() == plot_style.SPLIT_COLOURS["forget"])
    assert list(forget.get_xdata()) == [0, 1, 2, 3, 4]
    assert forget.get_ydata()[0] == 1.0 and forget.get_ydata()[-1] == pytest.approx(0.88)
    assert len(drifts.lines) == 2 and "2.0e-07" in drifts.get_title(loc="right")  # the leak is a note


@pytest.mark.parametrize("retrained", [True, False])
def test_the_retrained_level_is_drawn_only_if_there_is_one(retrained: bool) -> None:
    figure = plots.metrics_by_step(make_report(retrained))
    assert figure is not None
    assert any(line.get_linestyle() == "--" for line in figure.axes[0].lines) == retrained


def test_labels_at_the_ends_of_curves_do_not_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    def overlaps() -> bool:
        with matplotlib.rc_context(plot_style.STYLE):
            boxes = [text.get_window_extent() for text in drawn(plots.metrics_by_step(make_report())).axes[0].texts]
        assert len(boxes) == 3
        return any(a.overlaps(b) for a, b in combinations(boxes, 2))

    assert not overlaps()
    monkeypatch.setattr(plot_style, "spread_apart", lambda values, gap: values)
    assert overlaps()


def test_spread_keeps_the_gap_the_order_and_the_top() -> None:
    values = [0.98, 0.97, 0.2, 0.21, 0.5]
    assert min(b - a for a, b in pairwise(sorted(values))) < 0.1
    places = plot_style.spread_apart(values, gap=0.1)
    assert min(b - a for a, b in pairwise(sorted(places))) >= 0.1 - 1e-12
    assert np.argsort(places).tolist() == np.argsort(values).tolist()
    assert max(places) <= 1 and places[4] == 0.5


@pytest.mark.parametrize(("layers", "bars"), [(12, 12), (30, 30), (210, 0)])
def test_many_layers_become_curves_by_layer_type(layers: int, bars: int) -> None:
    figure = plots.drift_by_layer(make_report(layers=layers))
    assert figure is not None
    (axes,) = figure.axes
    assert len(axes.patches) == bars
    assert [text.get_text() for text in axes.texts][: 0 if bars else None] == (
        [] if bars else ["q_proj", "v_proj", "down_proj"]
    )
    for line in axes.lines:
        np.testing.assert_allclose(line.get_ydata(), 0.01 * (np.asarray(line.get_xdata()) + 1))


def test_the_experts_of_a_block_are_one_point_at_their_root_mean_square() -> None:
    drifts = {"h.0.experts.0.up": 3.0, "h.0.experts.1.up": 4.0, "h.1.experts.0.up": 1.0, "head": 2.0}
    curves, outside_blocks = layer_plot._by_type_and_block(drifts)
    assert curves == {"h.*.experts.*.up": {0: pytest.approx(math.sqrt(12.5)), 1: 1.0}}
    assert outside_blocks == {"head": 2.0}


def test_layer_names_are_shortened_but_never_made_equal() -> None:
    names = ["encoder.h.0.up", "encoder.h.1.up", "head"]
    assert layer_plot._without_prefix(names) == ["0.up", "1.up", "head"]
    twins = ["encoder.h.0.up", "decoder.h.0.up"]
    assert layer_plot._without_prefix(twins) == twins
    patterns = ["h.*.attention.output.dense", "h.*.output.dense", "h.*.attention.query"]
    assert layer_plot._shortest_endings(patterns) == ["attention.output.dense", "output.dense", "query"]


def test_the_bars_show_the_metric_that_early_stopping_used() -> None:
    report = make_report()
    report.metrics += [replace(metric, name="answer_probability") for metric in report.metrics]
    for setting, title in (("accuracy", "Accuracy"), ("probability", "Answer probability")):
        report.settings = {"forget_metric": setting}
        figure = plots.metrics_bars(report)
        assert figure is not None
        assert [axes.get_title(loc="left") or axes.get_title() for axes in figure.axes] == [title]
        heights = sorted(patch.get_height() for patch in figure.axes[0].patches)
        assert heights == sorted(metric.value for metric in report.metrics if metric.name == "accuracy")


def test_the_bars_show_the_content_beside_it() -> None:
    report = make_report()
    known = [MetricValue("content_known", v, "forget", m, n=4) for m, v in (("original", 0.9), ("unlearned", 0.5))]
    report.metrics += known
    figure = plots.metrics_bars(report)
    assert figure is not None
    panels = {axes.get_title(loc="left") or axes.get_title(): axes for axes in figure.axes}
    bars = [patch.get_height() for patch in panels["Content tokens above 0.5"].patches]
    assert bars == [0.9, 0.5] and len(panels) == 2


# Series of requests


def series_of(count: int, offset: float = 0.0) -> list[UnlearningReport]:
    """Return `count` reports: each request forgets 10 rows and evaluates the earlier ones again."""
    reports = []
    for number in range(1, count + 1):
        metrics = [MetricValue("accuracy", 0.9 + offset, "retain", "unlearned", 50)]
        metrics += [MetricValue("accuracy", 0.8 + offset, "holdout", "unlearned", 50)]
        metrics += [MetricValue("accuracy", 0.1 * number, "forget", "unlearned", 10)]
        metrics += [MetricValue("accuracy", 0.3 + offset, f"forgotten_{k}", "unlearned", 30) for k in range(1, number)]
        reports.append(UnlearningReport(metrics, series={"drift_used": {"relative": 0.01 * number + offset}}))
    return reports


def test_the_series_plot_draws_each_arm_over_the_requests(tmp_path: Path) -> None:
    joint = UnlearningReport([MetricValue("accuracy", 0.25, "forget", "unlearned", 40)], drift={"relative": 0.05})
    arms = {"carried": series_of(3), "fresh": series_of(3, 0.01), "joint": [joint]}
    upper, lower = series_plot.series_figure(arms, "accuracy").axes
    curves = [(list(line.get_xdata()), list(line.get_ydata())) for line in upper.get_lines()]
    assert ([1, 2, 3], pytest.approx([0.1, (2 + 9) / 40, (3 + 18) / 70])) in curves
    assert ([1, 2, 3], pytest.approx([0.91] * 3)) in curves and ([3], [0.25]) in curves
    drifts = [list(line.get_ydata()) for line in lower.get_lines()]
    assert drifts == [pytest.approx([0.01, 0.02, 0.03]), pytest.approx([0.02, 0.03, 0.04]), [0.05]]
    assert [text.get_text() for text in lower.get_legend().get_texts()] == list(arms)
    before = dict(matplotlib.rcParams)
    assert series_plot.save_series_plot(arms, tmp_path / "s.png", "accuracy").read_bytes().startswith(PNG)
    assert dict(matplotlib.rcParams) == before
