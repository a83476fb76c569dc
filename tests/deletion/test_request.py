"""Laws of a deletion request: the output folder appears complete or not at all, the retain rows are not read while
unlearning, and every run of one request starts from the same original weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.tiny import image_rows, tiny_vit
from hf_unlearn.data.batches import PaddingCollator
from hf_unlearn.deletion import fulfil, references
from hf_unlearn.deletion.fulfil import fulfil_request, fulfil_request_under, prepare_request
from hf_unlearn.deletion.request import DeletionRequest, EvaluationOptions, RequestModels, RequestRows
from hf_unlearn.errors import CoverageError, DataError, NonFiniteLossError, OutputError
from hf_unlearn.evaluation.report import UnlearningReport
from hf_unlearn.evaluation.row_scores import score_rows
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.trainer.config import UnlearningConfig
from hf_unlearn.trainer.presets import PRESETS

FORGET, RETAIN, HOLDOUT = image_rows(4, 1), image_rows(8, 2), image_rows(5, 3)


class CountedReads(list):
    """Rows that count how often they are read."""

    def __init__(self, rows: list[dict[str, Any]]):
        super().__init__(rows)
        self.reads = 0

    def __getitem__(self, index: Any) -> Any:
        self.reads += 1
        return super().__getitem__(index)

    def __iter__(self) -> Iterator[Any]:
        self.reads += 1
        return super().__iter__()


@pytest.fixture(autouse=True)
def quick_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a tiny request's time; one test draws."""
    if request.node.name != "test_the_folder_has_checkpoint_report_card_and_plots":
        monkeypatch.setattr("hf_unlearn.publishing.model_folder.save_plots", lambda report, folder: [])


def config_for(folder: Path, **changes: Any) -> UnlearningConfig:
    few = {"use_cpu": True, "disable_tqdm": True, "max_steps": 4, "per_device_train_batch_size": 2, "seed": 0}
    return UnlearningConfig(str(folder), **{**few, "learning_rate": 1e-2, "loss": "next_best", **changes})


def noise_request(
    rows: dict[str, Any] | None = None, models: dict[str, Any] | None = None, **changes: Any
) -> DeletionRequest:
    """A request on noise images; `rows` and `models` replace arguments of `RequestRows` and `RequestModels`."""
    model = tiny_vit()
    request_rows = {"forget": FORGET, "evaluation": {"retain": RETAIN, "holdout": HOLDOUT}, "source": "noise"}
    request_models = {"original": model, "collator": PaddingCollator()}
    others = {"timings": {"train": 1.5}}
    if "statistics" not in changes:
        others["statistics"] = collect_statistics(model, FORGET + RETAIN, fisher=True, progress=False)
    return DeletionRequest(
        models=RequestModels(**{**request_models, **(models or {})}),
        rows=RequestRows(**{**request_rows, **(rows or {})}),
        **{**others, **changes},
    )


def weights(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_folder_has_checkpoint_report_card_and_plots(tmp_path: Path) -> None:
    request = noise_request()
    before = weights(request.models.original)
    report = fulfil_request(request, config_for(tmp_path / "out"))
    found = files(tmp_path / "out")
    assert {"model.safetensors", "config.json", "unlearning_report.json", "README.md"} <= set(found)
    plots = [name for name in found if name.startswith("plots/") and name.endswith(".png")]
    assert plots and all(found[name].startswith(b"\x89PNG") and len(found[name]) > 1000 for name in plots)
    assert not [name for name in found if name.endswith((".bin", ".pt", ".pkl"))]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]  # no scratch folder stays
    again = tiny_vit(seed=5).from_pretrained(tmp_path / "out")
    scores = score_rows(again, FORGET, PaddingCollator())
    assert report.get("loss", "forget").value == pytest.approx(scores.loss.mean(), rel=1e-4)  # type: ignore[union-attr]
    changed = [name for name, weight in weights(again).items() if not torch.equal(weight, before[name])]
    assert changed
    for name, weight in weights(request.models.original).items():
        assert torch.equal(weight, before[name]), name


def test_which_parameters_train_does_not_depend_on_earlier_runs(tmp_path: Path) -> None:
    """With and without a constraint the layers' weights train and biases do not; afterwards nothing stays frozen."""
    out, request = tmp_path / "out", noise_request()
    prepared, model = prepare_request(request, config_for(out)), request.models.original
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any(name.endswith("bias") for name in trainable)
    trained, ends = {}, []
    for name in ("none", "energy", "none"):
        with prepared.unlearned(config_for(out, constraint=name, train_only=["*vit*"]), out) as result:
            trained[name] = {n for n, p in result.trainer.model.named_parameters() if p.requires_grad}
            ends.append(weights(result.trainer.model))
        assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable
    assert trained["none"] == trained["energy"] and all(name.endswith("weight") for name in trained["none"])
    first, other, again = ends
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert {n for n in first if not torch.equal(first[n], other[n])} == trained["none"]  # the control
    wrong = config_for(out, train_only=["*vit*"], freeze=["nothing"])
    with pytest.raises(CoverageError), prepared.unlearned(wrong, out):
        pass
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trainable


def test_the_report_has_the_request_the_method_and_the_measurements(tmp_path: Path) -> None:
    report = fulfil_request(noise_request(), config_for(tmp_path / "out"))
    assert report.request["rows"] == 4 and report.request["source"] == "noise" and report.request["date"]
    method = report.method
    assert (method["loss"], method["constraint"], method["steps"]) == ("next_best", "energy_ridge", 4)
    assert method["constraint_settings"]["energy"] == 0.9 and method["retain_rows_used"] == 0
    assert method["coverage"]["protected"] > 0 and method["coverage"]["exposed"] == []
    assert method["statistics"]["rows"] == len(RETAIN) and method["stopped"]
    preset_names = {name for values in PRESETS.values() for name in values} - {"optim"}
    assert preset_names <= {*report.settings, *report.method}, "the report has whatever a preset sets"
    assert report.settings["learning_rate"] == 1e-2 and report.settings["seed"] == 0
    assert report.timings["train"] == 1.5 and {"subtract", "unlearn", "evaluate"} <= set(report.timings)
    assert all(seconds >= 0 for seconds in report.timings.values())
    steps = [line["step"] for line in report.history if "loss" in line]
    assert steps == [1, 2, 3, 4] and report.drift["relative"] > 0 and report.drift["by_layer"]
    assert report.models == ["original", "unlearned"]
    for split, rows in (("forget", FORGET), ("retain", RETAIN), ("holdout", HOLDOUT)):
        for model in report.models:
            metric = report.get("accuracy", split, model)
            assert metric is not None and metric.n == len(rows)
    saved = json.loads((tmp_path / "out" / "unlearning_report.json").read_text())
    assert saved["request"] == report.request and UnlearningReport.load(tmp_path / "out").method == json.loads(
        json.dumps(method)
    )


@pytest.mark.parametrize("constraint", ["energy", "kronecker"])
def test_forget_rows_are_sketched_as_the_statistics_were(constraint: str, tmp_path: Path) -> None:
    wide = {"sketch_above": 20, "sketch_rank": 12}  # the MLP's inner inputs and outputs, 24 wide
    request = noise_request(
        statistics=collect_statistics(tiny_vit(), FORGET + RETAIN, fisher=True, progress=False, **wide)
    )
    with pytest.warns(UserWarning, match=r"the sketch of vit\.layers\.\d\.mlp\.fc"):
        report = fulfil_request(request, config_for(tmp_path / "out", constraint=constraint))
    assert report.method["sketched"]["grams"] == 2 and 0 < report.method["sketched"]["missed"] < 1
    assert report.method["statistics"]["rows"] == len(RETAIN) and report.drift["relative"] > 0
    assert fulfil_request(noise_request(), config_for(tmp_path / "exact")).method["sketched"] is None


def test_a_run_ends_at_the_budget_of_lost_retain_accuracy(tmp_path: Path) -> None:
    loose = fulfil_request(noise_request(), config_for(tmp_path / "loose", learning_rate=0.05, num_train_epochs=3))
    tight = fulfil_request(
        noise_request(),
        config_for(
            tmp_path / "tight", learning_rate=0.05, num_train_epochs=3, max_retain_drop=1e-6, forget_metric="loss"
        ),
    )
    assert "above max_retain_drop" in tight.method["stopped"] and "max_retain_drop" not in str(loose.method["stopped"])
    before, after = (tight.get("loss", "retain", model) for model in ("original", "unlearned"))
    assert before is not None and after is not None and after.value <= before.value + 1e-5


@pytest.mark.parametrize("constraint", ["energy", "kronecker"])
def test_retain_rows_are_not_read_before_the_evaluation(
    constraint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = CountedReads(RETAIN)
    request = noise_request(rows={"evaluation": {"retain": watched, "holdout": HOLDOUT}})
    plain, reads = references.evaluate_unlearning, []

    def evaluate(*args: Any, **options: Any) -> UnlearningReport:
        reads.append(watched.reads)
        return plain(*args, **options)

    monkeypatch.setattr(references, "evaluate_unlearning", evaluate)
    fulfil_request(request, config_for(tmp_path / "out", constraint=constraint))
    assert reads == [0]
    assert watched.reads > 0  # the watch works


def test_a_loss_with_a_retain_term_reads_the_retain_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watched = CountedReads(RETAIN)
    reads: list[int] = []
    plain = references.evaluate_unlearning
    monkeypatch.setattr(
        references, "evaluate_unlearning", lambda *a, **o: (reads.append(watched.reads), plain(*a, **o))[1]
    )
    report = fulfil_request(noise_request(rows={"retain": watched}), config_for(tmp_path / "out", loss="grad_diff"))
    assert reads[0] > 0 and report.method["retain_rows_used"] == len(RETAIN)


def test_a_failed_run_writes_nothing(nan_after_first: str, tmp_path: Path) -> None:
    request = noise_request()
    before = weights(request.models.original)
    with pytest.raises(NonFiniteLossError):
        fulfil_request(request, config_for(tmp_path / "out", loss=nan_after_first))
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(weight, before[name]) for name, weight in weights(request.models.original).items())


def test_a_failed_run_leaves_the_old_folder_as_it_was(nan_after_first: str, tmp_path: Path) -> None:
    fulfil_request(noise_request(), config_for(tmp_path / "out"))
    old = files(tmp_path / "out")
    args = config_for(tmp_path / "out", loss=nan_after_first, overwrite_output_dir=True)
    with pytest.raises(NonFiniteLossError):
        fulfil_request(noise_request(), args)
    assert files(tmp_path / "out") == old and [p.name for p in tmp_path.iterdir()] == ["out"]
    fulfil_request(noise_request(), args.but(loss="next_best", max_steps=2))
    assert files(tmp_path / "out")["model.safetensors"] != old["model.safetensors"]


def test_a_failure_while_writing_leaves_no_half_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("disk")

    monkeypatch.setattr("hf_unlearn.publishing.model_folder.write_card", fail)
    with pytest.raises(RuntimeError, match="disk"):
        fulfil_request(noise_request(), config_for(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_empty_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.txt").write_text("mine")

    def never(*args: Any, **options: Any) -> Any:
        raise AssertionError("work began")

    request = noise_request()
    for module, name in (
        (fulfil, "collect_with_options"),
        (fulfil, "UnlearningTrainer"),
        (references, "evaluate_unlearning"),
    ):
        monkeypatch.setattr(module, name, never)
    with pytest.raises(OutputError, match="is not empty"):
        fulfil_request(request, config_for(tmp_path))
    assert files(tmp_path) == {"mine.txt": b"mine"}


def test_an_empty_forget_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        fulfil_request(
            noise_request(rows={"forget": [], "evaluation": {}}, statistics=None),
            config_for(tmp_path / "out", constraint="none"),
        )
    assert list(tmp_path.iterdir()) == []


def test_several_runs_start_from_the_same_original_and_evaluate_it_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retrained = tiny_vit(seed=3)
    request, alone = (noise_request(models={"retrained": retrained}) for _ in range(2))
    before = weights(request.models.original)
    plain, collect = references.evaluate_unlearning, fulfil.collect_with_options
    measured: list[tuple[bool, bool]] = []
    collections: list[int] = []

    def evaluate(*args: Any, **options: Any) -> UnlearningReport:
        measured.append((options["original"] is not None, options["retrained"] is not None))
        return plain(*args, **options)

    monkeypatch.setattr(references, "evaluate_unlearning", evaluate)
    monkeypatch.setattr(fulfil, "collect_with_options", lambda *a, **o: (collections.append(1), collect(*a, **o))[1])
    configs = {name: config_for(tmp_path / name, constraint=name) for name in ("none", "energy")}
    reports = [finished.report for finished in fulfil_request_under(request, configs).values()]
    assert measured == [(True, True), (False, False)] and len(collections) == 1
    assert all(torch.equal(weight, before[name]) for name, weight in weights(request.models.original).items())
    assert all(report.models == ["original", "unlearned", "retrained"] for report in reports)
    for model in ("original", "retrained"):
        first, second = ([m for m in report.metrics if m.model == model] for report in reports)
        assert first == second and first
    assert reports[0].get("loss", "forget") != reports[1].get("loss", "forget")
    # the second run is the same as if it had been the only one
    only = fulfil_request(alone, config_for(tmp_path / "only", constraint="energy"))
    assert files(tmp_path / "only")["model.safetensors"] == files(tmp_path / "energy")["model.safetensors"]
    assert only.entropies == reports[1].entropies


def test_samples_show_the_original_before_and_the_unlearned_after(tmp_path: Path) -> None:
    def samples(model: Any) -> list[dict[str, str]]:
        return [{"prompt": "?", "answer": f"{sum(p.abs().sum().item() for p in model.parameters()):.6f}"}]

    request = noise_request(evaluation=EvaluationOptions(sample_answers=samples))
    (original,) = samples(request.models.original)
    for name in ("energy", "none"):
        (shown,) = fulfil_request(request, config_for(tmp_path / name, constraint=name)).samples
        assert shown["answer"] == original["answer"] != shown["after"]
