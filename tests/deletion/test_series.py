"""Laws of a series of requests: the carried statistics are the documented sum, and with energy 1.0 they equal a new
collection; each request starts from exactly the last one's weights; its private files must match its ledger."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.append_entries import KEY
from helpers.tiny import text_rows, tiny_gpt2, tiny_llama
from hf_unlearn.constraints.energy import EnergyConstraint
from hf_unlearn.constraints.ridge import RidgeConstraint
from hf_unlearn.deletion import fulfil
from hf_unlearn.deletion.carried_statistics import CARRIED
from hf_unlearn.deletion.fulfil import fulfil_request
from hf_unlearn.deletion.ledger import Ledger
from hf_unlearn.deletion.request import AdapterOptions, DeletionRequest, RequestModels, RequestRows
from hf_unlearn.deletion.room import room_left, running_out
from hf_unlearn.deletion.series import RequestSeries, raised_energy
from hf_unlearn.deletion.series_report import came_back
from hf_unlearn.errors import DataError, LedgerError, SettingsError
from hf_unlearn.evaluation.report import MetricValue, UnlearningReport
from hf_unlearn.models.fingerprint import weights_fingerprint
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.statistics.retain_statistics import RetainStatistics
from hf_unlearn.trainer.config import UnlearningConfig

ROWS = text_rows(10, 1)
FORGET = [ROWS[:2], ROWS[2:4], ROWS[4:5]]


@pytest.fixture(autouse=True)
def quick_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_unlearn.publishing.model_folder.save_plots", lambda report, folder: [])


class Chain:
    """A folder with a ledger and the models of its requests."""

    def __init__(self, folder: Path, model: Any, **settings: Any):
        self.folder, self.original, self.settings = folder, model, settings
        self.full = collect_statistics(model, ROWS, fisher=True, progress=False)

    @property
    def ledger(self) -> Ledger:
        return Ledger(self.folder / "ledger", KEY)

    def model(self, number: int) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder / f"out-{number}").eval() if number else self.original

    def request(self, number: int, rows: dict[str, Any] | None = None, **changes: Any) -> DeletionRequest:
        """Request `number`; `rows` are further arguments of `RequestRows`."""
        series = RequestSeries(self.ledger)
        model = self.model(number - 1)
        forget = FORGET[number - 1]
        arguments = {
            "models": RequestModels(original=model),
            "rows": RequestRows(**{"forget": forget, "evaluation": {"retain": ROWS[5:]}, **(rows or {})}),
            "statistics": series.statistics(model) if series.completed else self.full,
            "series": series.begin(forget),
        }
        return DeletionRequest(**{**arguments, **changes})

    def args(self, number: int, **changes: Any) -> UnlearningConfig:
        few = {"use_cpu": True, "disable_tqdm": True, "max_steps": 3, "per_device_train_batch_size": 2, "seed": 0}
        more = {"learning_rate": 1e-2, "loss": "next_best", "constraint": "energy", **self.settings, **changes}
        return UnlearningConfig(str(self.folder / f"out-{number}"), **{**few, **more})

    def fulfil(self, number: int, **changes: Any) -> UnlearningReport:
        return fulfil_request(self.request(number), self.args(number, **changes))

    def carried(self) -> RetainStatistics:
        (folder,) = (self.folder / "ledger" / "_private").glob("*/statistics")
        return RetainStatistics.from_pretrained(folder)


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    return Chain(tmp_path, tiny_llama(width=64))


def largest_difference(a: RetainStatistics, b: RetainStatistics) -> float:
    """Relative, over all Grams."""
    assert a.gram_sums.keys() == b.gram_sums.keys()
    return max(((a.gram_sums[k] - b.gram_sums[k]).norm() / b.gram_sums[k].norm()).item() for k in a.gram_sums)


def test_the_carried_statistics_are_the_documented_sum_and_those_of_the_last_weights(chain: Chain) -> None:
    for number in (1, 2):
        chain.fulfil(number)
    first, second = (collect_statistics(chain.model(n), FORGET[n], fisher=True, progress=False) for n in (0, 1))
    carried = chain.carried()
    for key, gram in chain.full.gram_sums.items():
        torch.testing.assert_close(carried.gram_sums[key], gram - first.gram_sums[key] - second.gram_sums[key])
    left = collect_statistics(chain.model(0), ROWS[4:], fisher=True, progress=False)
    assert (carried.rows, carried.data) == (6, left.data)  # which rows are left is exact
    assert carried.weights == weights_fingerprint(chain.model(2))
    assert carried.settings[CARRIED] == [weights_fingerprint(chain.model(n)) for n in (0, 1)]
    carried.check_model(chain.model(2))


@pytest.mark.parametrize(("energy", "exact"), [(1.0, True), (0.5, False)])
def test_with_energy_1_the_carried_statistics_equal_a_new_collection_on_the_last_model(
    energy: float, exact: bool, tmp_path: Path
) -> None:
    """The remaining rows and those of later requests did not move, so their inputs did not either; below 1 they did."""
    chain = Chain(tmp_path, tiny_llama(width=96, layers=1), constraint_settings={"energy": energy})
    reports = [chain.fulfil(number) for number in (1, 2)]
    fresh = collect_statistics(chain.model(2), ROWS[4:], fisher=True, progress=False)
    assert (largest_difference(chain.carried(), fresh) < 1e-5) == exact
    moved = [(a - b).abs().max() for a, b in zip(chain.original.parameters(), chain.model(2).parameters(), strict=True)]
    assert max(moved) > 1e-3
    assert all(report.series["negative_share"] < 1e-6 for report in reports) or not exact


def test_each_request_starts_from_the_weights_of_the_last_one(chain: Chain) -> None:
    reports = [chain.fulfil(number) for number in (1, 2, 3)]
    entries = chain.ledger.requests()
    prints = [weights_fingerprint(chain.model(n)) for n in range(4)]
    assert len(set(prints)) == 4
    for k, (entry, report) in enumerate(zip(entries, reports, strict=True)):
        content = entry.content
        assert content["weights"] == {"before": prints[k], "after": prints[k + 1]}
        assert content["statistics"]["before"]["weights"] == prints[k]
        assert content["statistics"]["after"]["rows"] == 10 - sum(map(len, FORGET[: k + 1]))
        assert content["request"] == report.request["number"] == k + 1
        assert content["commitment"] == report.request["commitment"]
        saved = UnlearningReport.load(chain.folder / f"out-{k + 1}")
        assert saved.request == report.request and saved.series == json.loads(json.dumps(report.series))
        assert content["commitment"] in (chain.folder / f"out-{k + 1}" / "README.md").read_text()
        assert [e.content["request"] for e in chain.ledger.prove(FORGET[k][0])] == [k + 1]
        assert {m["split"] for m in content["metrics"]} == {"forget", "retain"}
    assert chain.ledger.prove(ROWS[7]) == []
    assert len(list((chain.folder / "ledger" / "_private").glob("*/statistics"))) == 1  # only the last one's are kept


def test_drift_adds_up_over_requests_layer_by_layer(chain: Chain) -> None:
    reports = [chain.fulfil(number) for number in (1, 2)]
    used = reports[1].series["drift_used"]
    for layer, value in used["by_layer"].items():
        assert value == pytest.approx(sum(report.drift["by_layer"][layer] for report in reports))
    squares = [value**2 for value in used["by_layer"].values()]
    assert used["relative"] == pytest.approx((sum(squares) / len(squares)) ** 0.5)
    assert max(r.drift["relative"] for r in reports) < used["relative"] <= sum(r.drift["relative"] for r in reports)
    assert RequestSeries(chain.ledger).drift_used == pytest.approx(used["relative"])


def test_every_request_aims_at_the_held_out_value_before_the_first(chain: Chain) -> None:
    """The current model may have lost more on them; an explicit target takes precedence."""
    marks, found = [], []
    plain = fulfil.UnlearningTrainer.train

    def train(self: Any, **options: Any) -> Any:
        done = plain(self, **options)
        marks.append(self._stopping_callback().mark)
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fulfil.UnlearningTrainer, "train", train)
        for number in (1, 2, 3):
            request = chain.request(number, {"evaluation": {"retain": ROWS[5:], "holdout": text_rows(4, 9)}})
            report = fulfil_request(request, chain.args(number, forget_target=0.3 if number == 3 else None))
            found.append(report.get("answer_probability", "holdout", "original").value)  # type: ignore[union-attr]
            assert report.series["mark"] == (None if number == 1 else found[0])
    assert marks == pytest.approx([found[0], found[0], 0.3], rel=1e-5) and abs(found[1] / found[0] - 1) > 1e-3


@pytest.mark.parametrize("again", [True, False])
def test_early_stopping_looks_at_the_requests_own_rows_only(again: bool, chain: Chain) -> None:
    evaluation = {"retain": ROWS[5:], "holdout": text_rows(4, 9)}
    request = chain.request(1, {"evaluation": evaluation, "forgotten_before": ROWS[5:9] if again else ()})
    scored: list[int] = []
    plain = fulfil.UnlearningTrainer.get_eval_dataloader

    def watch(self: Any, rows: Any = None) -> Any:
        loader = plain(self, rows)
        scored.append(len(loader.dataset))
        return loader

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fulfil.UnlearningTrainer, "get_eval_dataloader", watch)
        fulfil_request(request, chain.args(1, eval_strategy="steps", eval_steps=1))
    assert scored and set(scored) == {len(FORGET[0]), 4}


def test_no_public_file_has_a_row_or_a_path(chain: Chain) -> None:
    chain.fulfil(1)
    public = [chain.folder / "ledger" / "ledger.jsonl", *(chain.folder / "out-1").glob("*.[jm][sd]*")]
    text = "".join(path.read_text() for path in public)
    assert str(chain.folder.parent) not in text and KEY.decode() not in text
    for row in FORGET[0]:
        assert str(row["input_ids"]) not in text and str(row["input_ids"]).replace(" ", "") not in text
    assert (chain.folder / "ledger" / "_private").stat().st_mode & 0o077 == 0


# The room


@pytest.mark.parametrize("constraint", [EnergyConstraint(0.8), EnergyConstraint(1.0), RidgeConstraint(0.1)])
def test_the_room_equals_that_of_a_dense_twin(constraint: Any, chain: Chain) -> None:
    forget = collect_statistics(chain.original, FORGET[0], fisher=True, progress=False)
    retain = chain.full - forget
    room = room_left(forget, retain, constraint)
    assert set(room) == set(retain.layers) and all(0 <= value <= 1 for value in room.values())
    for layer, found in room.items():
        values_I, vectors_II = torch.linalg.eigh(retain.gram(layer))
        if isinstance(constraint, RidgeConstraint):
            keep_I = 1 / (1 + values_I / (constraint.strength * values_I.mean()))
        else:
            # eigh's order is ascending: a direction is free if those above it have the share already, or if it is empty
            weight_I = values_I.clamp(min=0).sqrt()
            weight_I = weight_I * (values_I > 1e-12 * values_I.max())
            above_I = weight_I.flip(0).cumsum(0).flip(0) - weight_I
            keep_I = ((above_I >= constraint.energy * weight_I.sum() * (1 - 1e-12)) | (weight_I == 0)).double()
        factor_II = (vectors_II * keep_I) @ vectors_II.T
        gram_II = forget.gram(layer)
        twin = ((factor_II @ gram_II @ factor_II).trace() / gram_II.trace()).item()
        assert found == pytest.approx(twin, rel=2e-3, abs=1e-6), layer


def test_the_room_is_zero_for_protected_rows_and_one_without_protection(chain: Chain) -> None:
    assert max(room_left(chain.full, chain.full, EnergyConstraint(1.0)).values()) < 1e-5
    assert min(room_left(chain.full, chain.full, RidgeConstraint(1e9)).values()) > 0.99


@pytest.mark.parametrize(
    ("rooms", "warns"),
    [
        ([0.4], False),
        ([0.4, 0.3], False),
        ([0.4, 0.09], True),
        ([0.4, 0.3, 0.2], False),
        ([0.4, 0.3, 0.15], True),
        ([0.4, 0.19], True),
        ([0.0, 0.0], False),
        ([0.1, 0.5], False),
    ],
)
def test_the_warning_comes_before_the_room_has_run_out(rooms: list[float], warns: bool) -> None:
    """0.19 is 0.475 of 0.4, and at that rate the next is 0.226 of it."""
    assert running_out(rooms) == warns


def test_rising_energy_uses_up_the_room_and_causes_a_warning(tmp_path: Path) -> None:
    chain = Chain(tmp_path, tiny_llama())  # as many positions as features: energy 1 protects nearly everything
    rooms, warned = [], []
    for number in (1, 2, 3):
        settings = raised_energy({"energy": 0.3}, 0.35, number)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            report = chain.fulfil(number, constraint_settings=settings)
        rooms.append(report.series["room"]["mean"])
        lines = [line for line in report.series["warnings"] if "the room is running out" in line]
        assert set(report.series["warnings"]) <= {str(w.message) for w in caught}
        warned.append(bool(lines))
    assert rooms == sorted(rooms, reverse=True)
    assert warned == [running_out(rooms[: k + 1]) for k in range(3)]
    assert warned[0] is False and warned[-1] is True


def test_the_warning_comes_one_request_before_the_drift_budget_ends(chain: Chain) -> None:
    plain = Chain(chain.folder / "plain", chain.original).fulfil(1).drift["relative"]
    for budget, warns in ((2.5 * plain, False), (1.5 * plain, True)):
        own = Chain(chain.folder / str(budget), chain.original)
        report = own.fulfil(1, max_retain_drift=budget)
        assert report.series["drift_used"]["budget"] == budget
        assert ("drift budget is running out" in " ".join(report.series["warnings"])) == warns


def test_energy_steps_up_to_1() -> None:
    found = [
        raised_energy({"energy": 0.9, "spectrum": "eigenvalues"}, 0.04, number)["energy"] for number in (1, 2, 3, 4)
    ]
    assert found == pytest.approx([0.9, 0.94, 0.98, 1.0]) and raised_energy({}, 0.01, 2)["energy"] == pytest.approx(
        0.91
    )


# Requests that are refused


def test_a_row_cannot_be_in_two_requests(chain: Chain) -> None:
    chain.fulfil(1)
    with pytest.raises(DataError, match="already in request 1"):
        RequestSeries(chain.ledger).begin([FORGET[1][0], FORGET[0][1]])


def test_another_model_is_refused_before_any_work(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    chain.fulfil(1)
    request = chain.request(2, models=RequestModels(original=chain.original))
    monkeypatch.setattr(fulfil, "collect_with_options", lambda *a, **o: pytest.fail("work began"))
    with pytest.raises(LedgerError, match="start from that model"):
        fulfil_request(request, chain.args(2))
    inside = RequestSeries(Ledger(chain.folder / "out-2" / "ledger", KEY)).begin(FORGET[0])
    with pytest.raises(SettingsError, match="must not be inside the output folder"):
        fulfil_request(chain.request(2, series=inside), chain.args(2))
    with pytest.raises(SettingsError, match="choose another"):
        fulfil_request(chain.request(2), chain.args(1, overwrite_output_dir=True))
    assert len(chain.ledger.requests()) == 1 and not (chain.folder / "out-2").exists()


@pytest.mark.parametrize("harm", ["altered", "missing", "record"])
def test_private_files_that_do_not_match_the_ledger_are_refused(harm: str, chain: Chain) -> None:
    chain.fulfil(1)
    (private,) = (chain.folder / "ledger" / "_private").iterdir()
    if harm == "altered":  # a sound artifact, of the same weights, that another put there
        other = chain.carried()
        shutil.rmtree(private / "statistics")
        (other + other).save_pretrained(private / "statistics")
    elif harm == "missing":
        shutil.rmtree(private / "statistics")
    else:
        (private / "request.json").unlink()
    with pytest.raises(LedgerError, match="_private" if harm == "record" else "collect statistics again"):
        RequestSeries(chain.ledger).statistics(chain.model(1))


def test_a_kill_before_the_entry_leaves_the_series_as_it_was(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    chain.fulfil(1)

    def killed(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "append", killed)
        with pytest.raises(KeyboardInterrupt):
            chain.fulfil(2)
    assert (chain.folder / "out-2").is_dir() and len(chain.ledger.requests()) == 1
    series = RequestSeries(chain.ledger)
    assert series.number == 2 and series.statistics(chain.model(1)) is not None
    report = chain.fulfil(2, overwrite_output_dir=True)
    assert report.request["number"] == 2 and chain.ledger.verify().intact
    assert len(list((chain.folder / "ledger" / "_private").glob("*/statistics"))) == 1


def test_of_two_runs_of_the_same_request_the_second_is_refused(chain: Chain) -> None:
    first, second = chain.request(1), chain.request(1)
    fulfil_request(first, chain.args(1))
    with pytest.raises(LedgerError, match="meanwhile"):
        fulfil_request(second, chain.args(9))
    assert chain.ledger.verify().intact and chain.carried().weights == weights_fingerprint(chain.model(1))


def test_a_warning_says_that_statistics_are_out_of_date(tmp_path: Path) -> None:
    """With a weak constraint the inputs move far, and those of the forget rows are not the ones that were summed."""
    warned = {}
    for energy in (1.0, 0.05):
        chain = Chain(tmp_path / str(energy), tiny_llama(), constraint_settings={"energy": energy}, max_steps=8)
        reports = [chain.fulfil(number) for number in (1, 2)]
        warned[energy] = ["out of date" in " ".join(report.series["warnings"]) for report in reports]
    assert warned == {1.0: [False, False], 0.05: [False, True]}


# Earlier rows


def test_earlier_rows_are_loaded_if_they_match_and_otherwise_the_report_says_why(chain: Chain) -> None:
    for number in (1, 2):
        begun = RequestSeries(chain.ledger).begin(FORGET[number - 1], where={"place": number})
        fulfil_request(chain.request(number, series=begun), chain.args(number))

    def load(where: Mapping[str, Any]) -> Any:
        if where["place"] == 2:
            raise DataError("erased from /a/private/place")
        return list(reversed(FORGET[0]))

    series = RequestSeries(chain.ledger)
    earlier = series.earlier(load)
    assert list(earlier.rows) == [1] and earlier.untested == {2: "not available"}
    begun = series.begin(FORGET[2], untested=earlier.untested)
    with pytest.warns(UserWarning, match=r"earlier requests \(2\) are not available"):
        report = fulfil_request(chain.request(3, series=begun), chain.args(3))
    assert report.series["untested"] == {"2": "not available"}
    other = RequestSeries(chain.ledger).earlier(lambda where: ROWS[5:7])
    assert other.rows == {}
    assert set(other.untested.values()) == {"the available rows are not those of the request"}


def test_rows_forgotten_again_are_trained_on_and_subtracted_once(chain: Chain) -> None:
    chain.fulfil(1)
    request = chain.request(2, {"forgotten_before": FORGET[0]})
    seen: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        plain = fulfil.UnlearningTrainer

        def watch(model: Any, args: Any, forget: Any, *rest: Any, **options: Any) -> Any:
            seen.append(len(forget))
            return plain(model, args, forget, *rest, **options)

        patch.setattr(fulfil, "UnlearningTrainer", watch)
        report = fulfil_request(request, chain.args(2))
    assert seen == [4] and report.method["rows_forgotten_again"] == 2 and report.request["rows"] == 2
    assert (
        chain.carried().rows == 6 and chain.ledger.requests()[1].content["commitment"] == report.request["commitment"]
    )
    assert [e.content["request"] for e in chain.ledger.prove(FORGET[0][0])] == [1]


@pytest.mark.parametrize(("low", "warns"), [(0.11, True), (0.1, False)])
def test_a_warning_names_rows_that_come_back(low: float, warns: bool, chain: Chain) -> None:
    """They come back if their interval is above the interval after their own request."""
    left = {"name": "accuracy", "split": "forget", "model": "unlearned", "value": 0.05, "high": 0.1}
    chain.ledger.append("request", {"request": 1, "metrics": [left]}, after=0)
    completed = chain.ledger.requests()
    metrics = [MetricValue("accuracy", 0.5, "forgotten_1", "unlearned", 9, low, 0.9)]
    lines = list(came_back(UnlearningReport(metrics), completed))
    assert len(lines) == warns and all("request 1 came back" in line for line in lines)
    assert not list(came_back(UnlearningReport([replace(metrics[0], model="original")]), completed))


@pytest.mark.parametrize("merge", [True, False])
def test_an_adapter_must_be_merged_in_a_series(merge: bool, tmp_path: Path) -> None:
    from peft import LoraConfig

    chain = Chain(tmp_path, tiny_gpt2())  # tied embeddings and Conv1D, too
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    request = chain.request(1, adapter=AdapterOptions(peft_config=lora, merge=merge))
    if not merge:
        with pytest.raises(SettingsError, match="merge_adapter"):
            fulfil_request(request, chain.args(1))
        return
    fulfil_request(request, chain.args(1))
    series = RequestSeries(chain.ledger)
    series.check_model(chain.model(1))
    with pytest.raises(LedgerError):
        series.check_model(chain.original)
    chain.fulfil(2)
    assert [e.content["request"] for e in chain.ledger.requests()] == [1, 2]
