"""Laws of the grid: a finished cell is never run again, one that fails does not end the others, other models are not
mixed into a table; every benchmark runs from local folders; tables, plots and published numbers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from helpers.tiny import requires_asset
from hf_unlearn.benchmark.cell import Cell
from hf_unlearn.benchmark.frontier import save_frontier
from hf_unlearn.benchmark.grid import CELLS_FOLDER, Results, grid_cells, run_grid
from hf_unlearn.benchmark.registry import BENCHMARKS, Benchmark, Column
from hf_unlearn.benchmark.results import content, lines_of, markdown
from hf_unlearn.cli import main
from hf_unlearn.core.text import spread
from hf_unlearn.deletion.arguments import BenchmarkArguments
from hf_unlearn.deletion.fulfil import PreparedRequest
from hf_unlearn.errors import OutputError, SettingsError
from hf_unlearn.evaluation.report import MetricValue, UnlearningReport
from hf_unlearn.trainer.config import UnlearningConfig


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    model, data = requires_asset("stories260K"), requires_asset("tofu/full.json").parent
    return {"model": str(model), "data": str(data), "cache": str(tmp_path_factory.mktemp("cache"))}


def arguments(places: dict[str, str], **changes: Any) -> BenchmarkArguments:
    """Eight rows to learn, four of them to forget."""
    named = {"model_name_or_path": places["model"], "dataset_name": places["data"], "cache_dir": places["cache"]}
    splits = {"train": "full[0:8]", "forget": "full[0:4]", "holdout": "holdout10[0:4]"}
    grid = {"methods": "grad_ascent,npo", "constraints": "none,kronecker", "seeds": "0"}
    given = {**named, **splits, **grid, "retrained": places["model"], "attacks": "relearning", "relearn_steps": 2}
    return BenchmarkArguments(**{**given, "use_retain_rows": True, **changes})


def settings(folder: Path, **changes: Any) -> UnlearningConfig:
    few = {"use_cpu": True, "disable_tqdm": True, "max_steps": 2, "per_device_train_batch_size": 4, "max_length": 96}
    return UnlearningConfig(str(folder), **{**few, "learning_rate": 5e-3, "eval_strategy": "no", **changes})


def probability(report: UnlearningReport, model: str = "unlearned") -> float:
    metric = report.get("answer_probability", "forget", model)
    assert metric is not None
    return metric.value


def test_a_finished_cell_is_never_run_twice(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args, config = arguments(places), settings(tmp_path)
    first = run_grid(args, config, tmp_path)
    assert [(c.method, c.constraint) for c in first.reports] == [
        ("grad_ascent", "none"),
        ("grad_ascent", "kronecker"),
        ("npo", "none"),
        ("npo", "kronecker"),
    ]
    assert not first.failed
    for report in first.reports.values():
        assert probability(report) < probability(report, "original") and report.timings["unlearn"] > 0
        assert {m.model for m in report.metrics if m.name == "relearned_probability"} == {"unlearned", "retrained"}
        assert report.get("relearned_probability", "forget") is not None
    drifts = [report.drift["relative"] for report in first.reports.values()]
    assert drifts[1] < drifts[0] and drifts[3] < drifts[2]  # the constraint was there, and took effect

    ran: list[str] = []
    unlearned = PreparedRequest.unlearned

    def watched(self: PreparedRequest, config: Any, target: Path, references: Any) -> Any:
        ran.append(target.name)
        return unlearned(self, config, target, references)

    monkeypatch.setattr(PreparedRequest, "unlearned", watched)
    again = run_grid(args, config, tmp_path)
    assert not ran and [r.content() for r in again.reports.values()] == [r.content() for r in first.reports.values()]
    gone = next(iter(first.reports)).file
    (tmp_path / CELLS_FOLDER / gone).unlink()
    run_grid(args, config, tmp_path)
    assert ran == [gone.removesuffix(".json")]  # only the one that is missing
    ran.clear()
    more = run_grid(replace(args, seeds="0,1", methods="npo"), config, tmp_path)
    assert len(ran) == 2 and all("-1-" in name for name in ran) and len(more.reports) == 4
    ran.clear()
    run_grid(replace(args, methods="npo", constraints="none"), config.but(learning_rate=1e-3), tmp_path)
    assert len(ran) == 1  # other settings are other cells, and the old ones stay
    assert not list((tmp_path / CELLS_FOLDER).glob("*.checkpoints"))


def test_a_killed_grid_leaves_no_cell_that_looks_finished(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*given: Any, **how: Any) -> Any:
        raise KeyboardInterrupt

    args = arguments(places, methods="npo", constraints="none")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("hf_unlearn.benchmark.cell_run.audit", killed)
        run_grid(args, settings(tmp_path), tmp_path)
    assert not list((tmp_path / CELLS_FOLDER).glob("*.json"))
    assert len(run_grid(args, settings(tmp_path), tmp_path).reports) == 1


def test_a_cell_that_cannot_run_is_told_and_the_others_run_from_the_same_weights(
    places: dict[str, str], tmp_path: Path, nan_after_first: str
) -> None:
    args = arguments(places, methods=f"{nan_after_first},random_label,grad_ascent", constraints="none", attacks=None)
    found = run_grid(args, settings(tmp_path), tmp_path)
    assert [cell.method for cell in found.reports] == ["grad_ascent"]
    assert {cell.method: "the loss is nan" in words for cell, words in found.failed.items()} == {
        nan_after_first: True,
        "random_label": False,
    }
    with pytest.raises(SettingsError, match="eps"):  # which no cell could do without: said before any work
        run_grid(replace(args, methods="pdu"), settings(tmp_path / "no"), tmp_path / "no")
    alone = run_grid(replace(args, methods="grad_ascent"), settings(tmp_path / "alone"), tmp_path / "alone")
    assert probability(*found.reports.values()) == probability(*alone.reports.values())
    text = markdown("tofu", BENCHMARKS["tofu"], found, "the command")
    assert f"- {nan_after_first}, none, seed 0: " in text and "the command" in text


def test_cells_of_other_models_are_not_mixed(places: dict[str, str], tmp_path: Path) -> None:
    args = arguments(places, methods="npo,grad_ascent", constraints="none", attacks=None)
    (cell, other), reports = zip(*run_grid(args, settings(tmp_path), tmp_path).reports.items(), strict=True)
    path = tmp_path / CELLS_FOLDER / other.file
    changed = reports[1].content()
    changed["request"]["weights"] = "0" * 64
    path.write_text(json.dumps(changed))
    with pytest.raises(OutputError, match=r"\(npo, none, seed 0\) and \(grad_ascent, .* different weights"):
        run_grid(args, settings(tmp_path), tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("keep")
    with pytest.raises(OutputError, match="not empty and has no results of a benchmark"):
        run_grid(args, settings(tmp_path / "notes"), tmp_path / "notes")
    assert cell.method == "npo" and (tmp_path / "notes" / "mine.txt").read_text() == "keep"


def test_settings_of_a_cell(tmp_path: Path) -> None:
    args = BenchmarkArguments(
        methods="npo,rmu",
        constraints="none,energy",
        seeds="3",
        cell_settings='{"npo": {"learning_rate": 0.5, "loss_settings": {"beta": 1.0}}, "npo/energy": '
        '{"learning_rate": 0.25}, "energy": {"constraint_settings": {"energy": 0.5}}}',
    )
    config = settings(tmp_path, loss="rmu", loss_settings={"layer": 1}, seed=10)
    found = {(cell.method, cell.constraint): cell.config for cell in grid_cells(args, config)}
    assert {key: c.learning_rate for key, c in found.items()} == {
        ("npo", "none"): 0.5,
        ("npo", "energy"): 0.25,
        ("rmu", "none"): 5e-3,
        ("rmu", "energy"): 5e-3,
    }
    assert found["npo", "none"].loss_settings == {"beta": 1.0} and found["rmu", "none"].loss_settings == {"layer": 1}
    assert found["npo", "energy"].constraint_settings == {"energy": 0.5} and all(c.seed == 13 for c in found.values())
    assert found["npo", "none"].constraint_settings is None
    assert grid_cells(args, config)[0].args.fine_tune_seed == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ""}, "methods names nothing"),
        ({"methods": "forget"}, "unknown loss 'forget'"),
        ({"constraints": "iron"}, "unknown constraint 'iron'"),
        ({"seeds": "one"}, "seeds must be whole numbers"),
        ({"cell_settings": "{"}, "cell_settings must be JSON"),
        ({"cell_settings": {"npo": 3}}, "cell_settings must be of the form"),
        ({"cell_settings": {"np": {}}}, "cell_settings name no method, constraint or METHOD/CONSTRAINT: np"),
        ({"cell_settings": {"npo": {"rate": 1}}}, "cell_settings of npo/none: .*'rate'"),
    ],
)
def test_wrong_settings_are_one_line_before_any_work(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    given = {"methods": "npo", "constraints": "none", "seeds": "0", **changes}
    with pytest.raises(SettingsError, match=message):
        run_grid(BenchmarkArguments(**given), settings(tmp_path / "out"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Tables and plots


COLUMNS = (Column("forgotten", "accuracy", "forget"), Column("kept", "accuracy", "retain"))
PLAIN = Benchmark("plain", {}, COLUMNS, (("kept", "forgotten"),))


def results_with(values: dict[tuple[str, str, int], tuple[float, float]]) -> Results:
    """Results with these accuracies on forget and retain rows; the original has 1 and 1, the retrained 0.1 and 0.9."""
    reports = {}
    for (method, constraint, seed), (forgotten, kept) in values.items():
        cell = Cell(method, constraint, seed, BenchmarkArguments(), UnlearningConfig(use_cpu=True))
        numbers = {"unlearned": (forgotten, kept), "original": (1.0, 1.0), "retrained": (0.1, 0.9)}
        metrics = [
            MetricValue("accuracy", value, split, model, 10)
            for model, pair in numbers.items()
            for split, value in zip(("forget", "retain"), pair, strict=True)
        ]
        timings = {"subtract": 1.0, "unlearn": 2.0 + seed}
        reports[cell] = UnlearningReport(metrics, request={"rows": 10}, timings=timings, hardware="a machine")
    return Results(reports, {})


def test_the_table_has_means_and_ranges_over_seeds() -> None:
    found = results_with(
        {("npo", "none", 0): (0.2, 0.8), ("npo", "none", 1): (0.4, 0.9), ("npo", "energy", 0): (0.1, 1e-5)}
    )
    lines = markdown("plain", PLAIN, found, "command").splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert table == [
        "| method | constraint | forgotten | kept | time, s | seeds |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        "| original |  | 1.000 | 1.000 | - | 2 |",
        "| retrained |  | 0.100 | 0.900 | - | 2 |",
        "| npo | none | 0.300 (0.200-0.400) | 0.850 (0.800-0.900) | 3.5 (3.0-4.0) | 2 |",
        "| npo | energy | 0.100 | 1e-05 | 3.0 | 1 |",
    ]
    assert content("plain", PLAIN, found, "command")["cells"][2]["metrics"][1]["value"] == 1e-5
    assert spread([]) == "-" and spread([0.5, 0.5]) == "0.500"


def test_the_frontier_has_a_line_for_each_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    drawn: list[Any] = []
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *xy, **how: (drawn.append((xy, how)), plot(self, *xy, **how))[1])
    found = results_with(
        {
            ("npo", "none", 0): (0.2, 0.8),
            ("npo", "none", 1): (0.4, 0.9),
            ("npo", "energy", 0): (0.1, 0.7),
            ("rmu", "none", 0): (0.3, 0.6),
            ("rmu", "energy", 0): (0.2, 0.9),
        }
    )
    path = save_frontier(PLAIN, lines_of(found), tmp_path / "frontier.png")
    assert path is not None and path.stat().st_size > 5000
    lines = [[*map(list, xy)] for xy, how in drawn if "linewidth" in how]
    assert lines == [[[pytest.approx(0.85), 0.7], [pytest.approx(0.3), 0.1]], [[0.6, 0.9], [0.3, 0.2]]]
    assert sum(how.get("marker") == "*" for _, how in drawn) == 2
    named: list[str] = []
    monkeypatch.setattr(Figure, "legend", lambda self, handles, **how: named.extend(h.get_label() for h in handles))
    save_frontier(PLAIN, {**lines_of(found), ("idk", "none"): []}, tmp_path / "frontier.png")
    assert "rmu" in named and "idk" not in named, "what has no point is not named"
    assert save_frontier(PLAIN, lines_of(Results({}, {})), tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_is_coherent(name: str, tmp_path: Path) -> None:
    benchmark = BENCHMARKS[name]
    titles = [column.title for column in benchmark.columns]
    assert len(set(titles)) == len(titles) and all(title in titles for pair in benchmark.frontiers for title in pair)
    known = {*vars(BenchmarkArguments()), *vars(settings(tmp_path))}
    assert set(benchmark.defaults) <= known
    args = BenchmarkArguments(**{k: v for k, v in benchmark.defaults.items() if hasattr(BenchmarkArguments(), k)})
    assert len(grid_cells(args, settings(tmp_path))) >= 3 * 4 * 7
    for published in benchmark.published:
        assert set(published.columns) <= set(titles)
        assert all(len(row) == len(published.columns) for row in published.rows.values())
        assert set(published.rows) - {"original", "retrained"} <= set(args.methods.split(","))


def answer(capsys: pytest.CaptureFixture[str], *line: str) -> dict[str, Any]:
    assert main(["benchmark", *line, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


LIGHT = ["--use_cpu", "True", "--max_steps", "2", "--eval_strategy", "no", "--disable_tqdm", "True", "--seeds", "0"]


def test_tofu_from_a_local_folder(places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["tofu", "--model_name_or_path", places["model"], "--retrained", places["model"], "--max_rows", "3"]
    line += ["--dataset_name", places["data"], "--cache_dir", places["cache"], "--train", "retain_perturbed[0:8]"]
    line += ["--forget", "retain_perturbed[0:4]", "--holdout", "holdout10[0:4]", "--methods", "idk,next_best"]
    line += ["--constraints", "energy", "--relearn_steps", "1", "--max_length", "400", *LIGHT]
    found = answer(capsys, *line, "--output_dir", str(tmp_path))
    assert [cell["method"] for cell in found["cells"]] == ["idk", "next_best"] and not found["failed"]
    names = {(m["name"], m["split"]) for m in found["cells"][0]["metrics"] if m["model"] == "unlearned"}
    assert names >= {(c.metric, c.split) for c in BENCHMARKS["tofu"].columns}
    text = (tmp_path / "results.md").read_text()
    assert "| idk | energy |" in text and "Published: Llama-3.2-1B-Instruct, forget10" in text
    assert "hf-unlearn benchmark tofu" in text and (tmp_path / "frontier.png").stat().st_size > 5000
    assert json.loads((tmp_path / "results.json").read_text())["cells"] == found["cells"]


def test_muse_from_a_local_folder(places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The layout of the Hub's data set, with a subfolder for each configuration."""
    lines = (Path(places["data"]) / "full.json").read_text().splitlines()
    texts = [json.loads(line)["answer"] for line in lines]
    questions = [{"question": f"who is {i}", "answer": text[:20]} for i, text in enumerate(texts[:4])]
    files = {
        "raw/forget": [{"text": text[:80]} for text in texts[:4]],
        "raw/retain1": [{"text": text[:80]} for text in texts[20:24]],
        "privleak/holdout": [{"text": text[:80]} for text in texts[40:44]],
        "verbmem/forget": [{"prompt": text[:30], "gt": text[30:60]} for text in texts[:4]],
        "knowmem/forget_qa": questions,
        "knowmem/retain_qa": [{**row, "question": row["question"] + "?"} for row in questions],
    }
    for name, rows in files.items():
        path = tmp_path / "data" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(map(json.dumps, rows)))
    line = ["muse", "--model_name_or_path", places["model"], "--retrained", places["model"], "--max_length", "128"]
    line += ["--dataset_name", str(tmp_path / "data"), "--cache_dir", places["cache"], "--attacks", "none"]
    found = answer(
        capsys, *line, "--methods", "npo", "--constraints", "none", *LIGHT, "--output_dir", str(tmp_path / "out")
    )
    names = {(m["name"], m["split"]) for m in found["cells"][0]["metrics"] if m["model"] == "unlearned"}
    wanted = {(c.metric, c.split) for c in BENCHMARKS["muse"].columns if c.metric != "relearned_probability"}
    assert names >= wanted


@pytest.mark.parametrize(("name", "kind"), [("images", "image"), ("text", "text")])
def test_classifiers_from_local_folders(
    name: str, kind: str, classified: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [name, "--model_name_or_path", classified[kind], "--dataset_name", f"{classified[kind]}-data"]
    line += ["--train", "full[0:12]", "--forget", "full[0:4]", "--holdout", "full[12:16]", "--max_length", "32"]
    line += ["--fine_tune_epochs", "1", "--cache_dir", str(tmp_path / "cache"), "--methods", "random_label,npo"]
    found = answer(capsys, *line, "--constraints", "none,ridge", *LIGHT, "--output_dir", str(tmp_path / "out"))
    assert len(found["cells"]) == 4 and not found["failed"]
    names = {(m["name"], m["split"]) for m in found["cells"][0]["metrics"] if m["model"] == "unlearned"}
    assert names >= {(c.metric, c.split) for c in BENCHMARKS[name].columns}


def test_an_unknown_benchmark_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["benchmark", "imagenet"]) == 2
    assert capsys.readouterr().err == (
        "hf-unlearn: unknown benchmark 'imagenet'; did you mean 'images'? choose from images, muse, text, tofu, wmdp\n"
    )
    assert main(["benchmark"]) == 2 and "name a benchmark first" in capsys.readouterr().err
