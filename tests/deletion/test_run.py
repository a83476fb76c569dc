"""Laws of complete runs with a real tokenizer and a trained model: a request from names to folders, from the
cache, from saved statistics. Skipped if the model or the data set is missing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.command_lines import FINISHED
from helpers.tiny import requires_asset
from hf_unlearn.cli import main
from hf_unlearn.cli.answers import reports_answer
from hf_unlearn.constraints.registry import CONSTRAINTS
from hf_unlearn.data.batches import default_collator
from hf_unlearn.data.encoding import encode_dataset
from hf_unlearn.data.splits import load_rows
from hf_unlearn.deletion.arguments import RunArguments
from hf_unlearn.deletion.fine_tuning import FineTuning
from hf_unlearn.deletion.rows import forget_rows
from hf_unlearn.deletion.run import collect_split, evaluate_finished, run_request
from hf_unlearn.errors import DataError, SettingsError
from hf_unlearn.evaluation import measurements as measures
from hf_unlearn.evaluation.report import UnlearningReport
from hf_unlearn.evaluation.row_scores import score_rows
from hf_unlearn.models.loading import load_model, load_tokenizer
from hf_unlearn.statistics.options import CollectionOptions
from hf_unlearn.statistics.retain_statistics import RetainStatistics
from hf_unlearn.trainer.config import UnlearningConfig


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    model, data = requires_asset("stories260K"), requires_asset("tofu/full.json").parent
    return {"model": str(model), "data": str(data), "cache": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(autouse=True)
def quick_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a small request's time, and has its own tests."""
    monkeypatch.setattr("hf_unlearn.publishing.model_folder.save_plots", lambda report, folder: [])


def arguments(places: dict[str, str], **changes: Any) -> RunArguments:
    """Twelve rows to learn, four of them to forget, four never seen."""
    fine_tune = {"fine_tune": True, "fine_tune_epochs": 25, "fine_tune_learning_rate": 5e-3}
    named = {"model_name_or_path": places["model"], "dataset_name": places["data"], "cache_dir": places["cache"]}
    splits = {"train": "full[0:12]", "forget": "full[0:4]", "holdout": "full[200:204]"}
    return RunArguments(**{**named, **splits, **fine_tune, "fine_tune_batch_size": 6, **changes})


def settings(folder: Path, **changes: Any) -> UnlearningConfig:
    few = {"use_cpu": True, "disable_tqdm": True, "max_steps": 8, "per_device_train_batch_size": 4, "max_length": 128}
    return UnlearningConfig(str(folder), **{**few, "learning_rate": 5e-3, "eval_strategy": "no", **changes})


def probability(report: UnlearningReport, split: str, model: str = "unlearned") -> float:
    metric = report.get("answer_probability", split, model)
    assert metric is not None
    return metric.value


def no_fine_tuning(*args: Any, **options: Any) -> Any:
    raise AssertionError("fine-tuned although the cache has the model")


@pytest.mark.parametrize(
    ("name", "value", "seen"),
    [
        ("learning_rate", -1.0, "fine_tune_learning_rate must be at least 0 and finite, got -1.0"),
        ("batch_size", 0, "fine_tune_batch_size must be at least 1 and finite, got 0"),
        ("epochs", -1.0, "fine_tune_epochs must be at least 0"),
        ("seed", -1, "fine_tune_seed must be at least 0 and below 4294967296"),
    ],
)
def test_a_fine_tune_setting_out_of_range_is_named_by_its_flag(name: str, value: float, seen: str) -> None:
    with pytest.raises(SettingsError, match=seen):
        FineTuning(**{name: value})


def test_sample_answers_are_shown_by_default_and_never_written(places: dict[str, str], tmp_path: Path) -> None:
    (report,) = run_request(arguments(places), settings(tmp_path / "out")).values()
    assert len(report.private_samples) == 3 and report.samples == []
    assert report.content_counts["forget"]["rules"] == {"reference": 4}  # the model that was fine-tuned
    answer = reports_answer({"energy_ridge": report}, str(tmp_path / "out"), "answer_probability")
    texts = {value for sample in report.private_samples for value in sample.values()} - {"nothing", ""}
    assert texts and all(text.splitlines()[0] in str(answer.text) for text in texts)
    assert "samples" in str(answer.content) and "private_samples" not in str(answer.content)
    for file in ("unlearning_report.json", "README.md"):
        written = (tmp_path / "out" / file).read_text()
        assert not any(sample["prompt"] in written for sample in report.private_samples)
    tuned = arguments(places, model_name_or_path=str(tmp_path / "out"), fine_tune=False, samples=0)
    (none,) = run_request(tuned, settings(tmp_path / "none")).values()
    assert none.private_samples == none.samples == []
    assert none.content_counts["forget"]["rules"] == {"short context": 4}  # negative control: without a reference
    (given,) = run_request(tuned, settings(tmp_path / "given", reference_model=places["model"])).values()
    assert given.content_counts["forget"]["rules"] == {"reference": 4}


def test_one_request_under_two_constraints_is_judged_by_the_same_masks(places: dict[str, str], tmp_path: Path) -> None:
    reports = run_request(arguments(places, constraints="energy,energy_ridge"), settings(tmp_path / "out"))
    one, two = reports.values()
    assert one.content_counts == two.content_counts and one.content_counts["forget"]["content_tokens"] > 0
    for name in ("content_loss", "function_loss", "greedy_reveals"):
        assert one.get(name, "forget", "original") == two.get(name, "forget", "original")
        assert two.get(name, "forget") is not None and len(two.private_samples) == 3


def test_a_run_fine_tunes_unlearns_and_saves_and_the_next_one_uses_the_cached_model(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = arguments(places, samples=1)
    ((name, report),) = run_request(args, settings(tmp_path / "one")).items()
    assert name == "energy_ridge"
    assert probability(report, "forget", "original") > probability(report, "holdout", "original") + 0.1  # it knows them
    assert probability(report, "forget") < probability(report, "forget", "original") - 0.05
    lost = {s: probability(report, s, "original") - probability(report, s) for s in ("forget", "retain")}
    assert lost["forget"] > lost["retain"]
    assert report.request["rows"] == 4 and report.method["statistics"]["rows"] == 8
    assert report.get("accuracy", "retain").n == 8  # type: ignore[union-attr]
    (sample,) = report.samples
    assert sample["prompt"] and sample["answer"] and "after" in sample and sample["still says"]
    assert report.private_samples == [] and "still says" in (tmp_path / "one" / "unlearning_report.json").read_text()
    known = [report.get(name, "forget", "original").value for name in ("content_known", "content_loss")]  # type: ignore[union-attr]
    assert known[0] > report.get("content_known", "forget").value  # type: ignore[union-attr]
    assert known[1] < report.get("content_loss", "forget").value  # type: ignore[union-attr]
    for file in ("model.safetensors", "tokenizer.json", "unlearning_report.json", "README.md"):
        assert (tmp_path / "one" / file).is_file(), file
    assert report.timings["train original"] > 0

    monkeypatch.setattr(FineTuning, "run", no_fine_tuning)
    (again,) = run_request(args, settings(tmp_path / "two")).values()
    weights = [load_model(str(tmp_path / folder)).state_dict() for folder in ("one", "two")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    assert [m for m in again.metrics] == [m for m in report.metrics]
    with pytest.raises(AssertionError, match="cache"):  # other rows are another model
        run_request(arguments(places, train="full[0:13]"), settings(tmp_path / "three"))


def test_all_constraints_run_from_one_original_into_a_folder_each(places: dict[str, str], tmp_path: Path) -> None:
    reports = run_request(arguments(places, constraints="all"), settings(tmp_path, max_steps=2))
    assert list(reports) == list(CONSTRAINTS)
    originals = [[m for m in report.metrics if m.model == "original"] for report in reports.values()]
    assert all(metrics == originals[0] for metrics in originals)
    for name, report in reports.items():
        assert UnlearningReport.load(tmp_path / name).method["constraint"] == name == report.method["constraint"]
        assert (tmp_path / name / "model.safetensors").is_file() and (tmp_path / name / "README.md").is_file()
        assert probability(report, "forget") < probability(report, "forget", "original")
    found = {name: probability(report, "forget") for name, report in reports.items()}
    assert found["energy_ridge"] == found.pop("ridge")  # this net's inputs have no leading directions to cut
    retained = {name: (report.method["retained"] or {}).get("rank") for name, report in reports.items()}
    assert retained["energy_ridge"] == 0 < retained["energy"] and retained["ridge"] is None
    cards = {name: (tmp_path / name / "README.md").read_text() for name in ("energy", "energy_ridge")}
    assert "nothing is cut" in cards["energy_ridge"] and "nothing is cut" not in cards["energy"]
    assert len(set(found.values())) == len(found)
    drifts = {name: report.drift["relative"] for name, report in reports.items()}
    assert all(drifts[name] < drifts["none"] for name in drifts if name != "none")


def test_constraints_may_name_a_single_constraint(places: dict[str, str], tmp_path: Path) -> None:
    config = settings(tmp_path / "out", max_steps=1, constraint_settings={"energy": 0.5})
    ((name, report),) = run_request(arguments(places, constraints="none"), config).items()
    assert name == report.method["constraint"] == "none" and (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("merge", [False, True], ids=["adapter", "merged"])
def test_an_adapter_is_trained_and_written_for_each_constraint(
    merge: bool, places: dict[str, str], tmp_path: Path
) -> None:
    lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["q_proj", "down_proj"], "merge_adapter": merge}
    reports = run_request(arguments(places, constraints="energy,ridge", **lora), settings(tmp_path, max_steps=2))
    assert list(reports) == ["energy", "ridge"]
    first, second = ([m for m in r.metrics if m.model == "original"] for r in reports.values())
    assert first == second  # the model is as it was after each
    for name, report in reports.items():
        files = {path.name for path in (tmp_path / name).iterdir()}
        assert ("model.safetensors" in files) == merge and ("adapter_model.safetensors" in files) != merge
        assert "machine-unlearning" in (tmp_path / name / "README.md").read_text()  # our card, not PEFT's
        assert probability(report, "forget") < probability(report, "forget", "original")
        if merge:
            loaded = load_model(str(tmp_path / name))
            rows = load_rows(places["data"], "full[0:4]", "forget")
            encoded = encode_dataset(rows, load_tokenizer(places["model"]), max_length=128)
            found = score_rows(loaded, encoded, default_collator(load_tokenizer(places["model"])))
            assert found.probability.mean() == pytest.approx(probability(report, "forget"), rel=1e-3)


def test_an_auto_retrained_model_never_saw_the_forget_rows(places: dict[str, str], tmp_path: Path) -> None:
    seen: list[int] = []
    plain = FineTuning.run

    def watch(self: FineTuning, model: Any, rows: Any, *rest: Any) -> Any:
        seen.append(len(rows))
        return plain(self, model, rows, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FineTuning, "run", watch)
        (report,) = run_request(arguments(places, retrained="auto"), settings(tmp_path / "out", max_steps=1)).values()
    assert seen[-1] == 8
    assert probability(report, "forget", "retrained") < probability(report, "forget", "original") - 0.1
    assert probability(report, "retain", "retrained") > probability(report, "holdout", "retrained") + 0.1


def test_a_run_accepts_collected_statistics(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Statistics of the train split, or of the retain split with nothing to subtract, lead to the same weights."""
    common = ["--model_name_or_path", places["model"], "--dataset_name", places["data"]]
    cut = ["--max_length", "128"]  # shorter than some of the rows
    folders = {"full[0:12]": tmp_path / "full", "full[4:12]": tmp_path / "retain"}
    for rows, folder in folders.items():
        assert main(["collect", *common, "--rows", rows, "--fisher", *cut, "--output_dir", str(folder)]) == 0
        assert str(folder) in capsys.readouterr().out
    whole, retain = (RetainStatistics.from_pretrained(folder) for folder in folders.values())
    assert (whole.rows, retain.rows) == (12, 8)
    models = {}
    for run_name, name, subtract in (
        ("subtracted", "full", "True"),
        ("retain", "retain", "False"),
        ("control", "full", "False"),
    ):
        flags = ["--train", "full[0:12]", "--forget", "full[0:4]", "--max_steps", "2", "--use_cpu", "True"]
        flags += ["--statistics", str(tmp_path / name), "--subtract_forget", subtract, "--cache_dir", places["cache"]]
        flags += ["--output_dir", str(tmp_path / f"out-{run_name}"), "--constraint", "kronecker", *cut]
        flags += ["--relative_step", "False", "--learning_rate", "100"]
        assert main(["run", *common, *flags]) in FINISHED
        rows = 12 if run_name == "control" else 8
        assert UnlearningReport.load(tmp_path / f"out-{run_name}").method["statistics"]["rows"] == rows
        models[run_name] = load_model(str(tmp_path / f"out-{run_name}")).state_dict()
    base = load_model(places["model"]).state_dict()

    def norm(weights: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
        return torch.stack([(weights[key] - others[key]).norm() for key in base]).norm().item()

    # In exact arithmetic both runs are the same. In float32 each of the two steps writes the weights twice: after the
    # optimizer's step, of norm at most 1.9 times the learning rate (gradients clipped to norm 1, momentum 0.9),
    # and after the constraint. Each write rounds by at most 2^-24 of what it writes. (With relative_step this rounding
    # would be scaled up with the step, of which kronecker lets less than a thousandth through.)
    size = norm(base, {key: torch.zeros_like(weight) for key, weight in base.items()})
    rounding = 2 * 2**-24 * (size + 1.9 * 100 + size)
    moved = norm(models["retain"], base)
    assert norm(models["subtracted"], models["retain"]) < rounding < 1e-3 * moved
    assert norm(models["control"], models["retain"]) > 0.1 * moved  # the forget rows' statistics do make a difference


def test_max_rows_of_collect_takes_the_first_ones(places: dict[str, str], tmp_path: Path) -> None:
    args = arguments(places, max_rows=3)
    assert collect_split(args, "full[0:5]", CollectionOptions(max_rows=3), str(tmp_path / "s"), False).rows == 3
    assert RetainStatistics.from_pretrained(tmp_path / "s").rows == 3


def test_evaluate_prints_a_table_of_the_splits_and_models(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model_name_or_path", places["model"], "--dataset_name", places["data"], "--forget", "full[0:2]"]
    flags += ["--holdout", "full[8:11]", "--original", places["model"], "--output_dir", str(tmp_path / "out")]
    assert main(["evaluate", *flags, "--eval_splits", "real_authors[0:2]"]) == 0
    lines = capsys.readouterr().out.splitlines()
    header = next(line for line in lines if line.startswith("metric"))
    assert header.split() == ["metric", "split", "original", "unlearned", "n"]
    for split, n in (("forget", "2"), ("holdout", "3"), ("real_authors[0:2]", "2")):
        (line,) = [line for line in lines if line.split()[:2] == ["answer_probability", split]]
        assert line.split()[-1] == n
    report = UnlearningReport.load(tmp_path / "out")
    for metric in report.metrics:
        if metric.model == "original":  # it is the same model
            assert report.get(metric.name, metric.split).value == metric.value  # type: ignore[union-attr]


def test_max_rows_limits_the_rows_that_are_evaluated(places: dict[str, str]) -> None:
    args = arguments(places, forget="full[0:5]", train="", max_rows=2)
    report = evaluate_finished(args, None, 4, 0)
    assert {m.n for m in report.metrics if m.name == "loss"} == {2}


def test_row_ranges_are_those_rows_of_the_file(places: dict[str, str]) -> None:
    lines = (Path(places["data"]) / "full.json").read_text().splitlines()
    rows = [json.loads(line) for line in lines]

    def questions(splits: str) -> list[str]:
        return [row["question"] for row in load_rows(places["data"], splits, "forget")]

    assert questions("full[3:7]") == [row["question"] for row in rows[3:7]]
    assert questions("full[:2]") == [row["question"] for row in rows[:2]]
    assert questions("full[3995:]") == [row["question"] for row in rows[3995:]]
    assert questions("full[0:2], full[9:10]") == [rows[i]["question"] for i in (0, 1, 9)]
    assert len(questions("forget01")) == len((Path(places["data"]) / "forget01.json").read_text().splitlines())


@pytest.mark.parametrize(
    "splits", ["", "full[1]", "full[1:2:3]", "full[x:2]", "full[0:0]", "full[9999:10000]", "no", ","]
)
def test_a_malformed_or_empty_split_is_refused(splits: str, places: dict[str, str]) -> None:
    with pytest.raises(DataError):
        load_rows(places["data"], splits, "forget")


def test_forget_rows_must_be_among_the_train_rows(places: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 forget rows are not in the train split"):
        run_request(arguments(places, forget="full[10:14]"), settings(tmp_path / "out"))
    with pytest.raises(DataError, match="also in the retain set"):
        run_request(arguments(places, retain="full[3:12]"), settings(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_constraint_needs_statistics_or_train_rows(places: dict[str, str], tmp_path: Path) -> None:
    args = arguments(places, train="", fine_tune=False)
    with pytest.raises(SettingsError, match="--statistics, or --train"):
        run_request(args, settings(tmp_path / "out"))
    (report,) = run_request(args, settings(tmp_path / "out", constraint="none", max_steps=1)).values()
    assert report.method["statistics"] is None and report.get("loss", "retain") is None


@pytest.mark.parametrize(
    ("changes", "way_out"), [({"fine_tune": True}, "--train"), ({"retrained": "auto"}, "--retain")]
)
def test_training_without_rows_to_train_on_is_refused(
    changes: dict[str, Any], way_out: str, places: dict[str, str], tmp_path: Path
) -> None:
    args = arguments(places, **{"train": "", "fine_tune": False, **changes})
    with pytest.raises(SettingsError, match=way_out):
        run_request(args, settings(tmp_path / "out", constraint="none"))


def test_a_request_needs_only_statistics_and_forget_rows(places: dict[str, str], tmp_path: Path) -> None:
    collect_split(arguments(places), "full[4:12]", CollectionOptions(), str(tmp_path / "statistics"), False)
    args = arguments(
        places, train="", fine_tune=False, holdout=None, statistics=str(tmp_path / "statistics"), subtract_forget=False
    )
    (report,) = run_request(args, settings(tmp_path / "out", max_steps=1)).values()
    assert {metric.split for metric in report.metrics} == {"forget"} and report.method["statistics"]["rows"] == 8


# Which rows are forgotten


def names_only(places: dict[str, str], tmp_path: Path, **changes: Any) -> RunArguments:
    return RunArguments(places["model"], dataset_name=places["data"], cache_dir=str(tmp_path), **changes)


def test_rows_are_forgotten_by_filter_numbers_or_request(places: dict[str, str], tmp_path: Path) -> None:
    whole = load_rows(places["data"], "full[0:40]", "forget")
    name = whole[20]["answer"].split()[0]
    by_filter = forget_rows(names_only(places, tmp_path, train="full[0:40]", forget_filter=f'answer contains "{name}"'))
    assert by_filter["answer"] == [a for a in whole["answer"] if name in a] and 0 < len(by_filter) < 40
    (tmp_path / "rows.txt").write_text("3\n1\n")
    by_number = forget_rows(
        names_only(places, tmp_path, forget="full[10:20]", forget_indices=str(tmp_path / "rows.txt"))
    )
    assert by_number["question"] == [whole[13]["question"], whole[11]["question"]]
    requests = [whole[5], {"question": whole[7]["question"]}]
    (tmp_path / "requests.jsonl").write_text("\n".join(map(json.dumps, requests)))
    asked: dict[str, Any] = {"forget_request": str(tmp_path / "requests.jsonl")}
    by_request = forget_rows(names_only(places, tmp_path, train="full[0:40]", **asked))
    assert by_request["answer"] == [whole[5]["answer"], whole[7]["answer"]]
    (tmp_path / "requests.jsonl").write_text(json.dumps(whole[5]))
    assert forget_rows(names_only(places, tmp_path, **asked))[0] == whole[5]  # no data set: the file has the rows
    with pytest.raises(SettingsError, match="pass only one of --forget_filter and --forget_request"):
        forget_rows(names_only(places, tmp_path, train="full", forget_filter="a == 1", **asked))
    with pytest.raises(DataError, match="selects none of the 40 rows"):
        forget_rows(names_only(places, tmp_path, train="full[0:40]", forget_filter='answer == "?"'))


def test_a_run_by_filter_with_idk_answers_and_outputs_on_disk(places: dict[str, str], tmp_path: Path) -> None:
    name = load_rows(places["data"], "full[0:4]", "forget")[0]["answer"].split()[0]
    args = arguments(places, forget="full[0:4]", forget_filter=f'answer contains "{name}"')
    config = settings(tmp_path / "out", loss="idk", original_logprobs=str(tmp_path / "outputs"), max_steps=3)
    (report,) = run_request(args, config).values()
    assert 1 <= report.request["rows"] <= 4 and (tmp_path / "outputs" / "original_outputs.json").is_file()
    assert report.method["loss"] == "idk" and report.method["loss_settings"]["gamma"] == 1
    assert probability(report, "forget") < probability(report, "forget", "original")
    with pytest.raises(DataError, match="forget rows are also in the holdout set"):
        run_request(arguments(places, holdout="full[2:6]"), settings(tmp_path / "other"))


# Classifiers


@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_classifier_is_unlearned_from_raw_rows(kind: str, classified: dict[str, str], tmp_path: Path) -> None:
    args = RunArguments(
        classified[kind],
        f"{classified[kind]}-data",
        task=f"{kind}-classification",
        max_rows=6,
        cache_dir=str(tmp_path),
        train="full[0:12]",
        forget="full[0:3]",
        holdout="full[12:16]",
        subtract_forget=True,
    )
    config = settings(tmp_path / "out", loss="random_label", max_steps=6, learning_rate=5e-2, constraint="none")
    (report,) = run_request(args, config).values()
    assert probability(report, "forget") < probability(report, "forget", "original") - 0.01
    assert report.request["rows"] == 3 and report.get("accuracy", "retain").n == 6  # type: ignore[union-attr]
    finished = replace(args, model_name_or_path=str(tmp_path / "out"), train="", holdout=None, retain="full[3:9]")
    again = evaluate_finished(finished, None, 4, 0, max_length=32)
    assert probability(again, "forget") == pytest.approx(probability(report, "forget"), abs=1e-6)
    with pytest.raises(SettingsError, match="samples are answers of language models"):
        run_request(replace(args, samples=1), config.but(output_dir=str(tmp_path / "other")))
    with pytest.raises(SettingsError, match="unknown task 'speech'; choose from language-model"):
        run_request(replace(args, task="speech"), config.but(output_dir=str(tmp_path / "other")))
    with pytest.raises(SettingsError, match=f"a model of task {kind}-classification, and --task is language-model"):
        run_request(replace(args, task="language-model"), config.but(output_dir=str(tmp_path / "other")))


def test_no_model_is_scored_twice_on_the_same_rows(
    places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[int] = []
    score = measures.score_rows
    monkeypatch.setattr(measures, "score_rows", lambda *given: (scored.append(1), score(*given))[1])
    args = arguments(places, retrained=places["model"], constraints="energy,none", cache_dir=str(tmp_path / "cache"))
    reports = run_request(args, settings(tmp_path / "out", max_steps=1))
    splits = len({metric.split for metric in reports["energy"].metrics})
    assert len(scored) == 4 * splits  # the original, the retrained and two unlearned models
    assert all(report.models == ["original", "unlearned", "retrained"] for report in reports.values())
    scored.clear()
    run_request(args, settings(tmp_path / "again", max_steps=1, learning_rate=3e-3))
    assert len(scored) == 2 * splits  # only what is new
