"""A constraint, a loss, a metric, an attack and a benchmark that this file defines go through a run, an audit and a
grid, and appear in the card and in the table; nothing in the package names them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.commands import PEOPLE, tiny_model
from hf_unlearn.benchmark.grid import grid_cells, run_grid
from hf_unlearn.benchmark.registry import BENCHMARKS, Benchmark, Column, register_benchmark
from hf_unlearn.benchmark.results import write
from hf_unlearn.constraints.base import Constraint
from hf_unlearn.constraints.factors import Scale
from hf_unlearn.constraints.registry import CONSTRAINTS, register_constraint
from hf_unlearn.deletion.arguments import BenchmarkArguments, RunArguments
from hf_unlearn.deletion.run import add_audit, audit_finished, run_request
from hf_unlearn.errors import SettingsError
from hf_unlearn.evaluation.attacks.registry import ATTACKS, register_attack
from hf_unlearn.evaluation.attacks.subject import AuditSettings, Outcome, Subject
from hf_unlearn.evaluation.metrics.base import NUMBER, UnlearningMetric
from hf_unlearn.evaluation.metrics.intervals import Estimate, bootstrap, bootstrap_mean
from hf_unlearn.evaluation.metrics.registry import METRICS, register_metric
from hf_unlearn.losses.registry import LOSSES, register_loss
from hf_unlearn.models.forward import Predictions
from hf_unlearn.models.modes import restored
from hf_unlearn.trainer.config import UnlearningConfig

CONSTRAINT, LOSS, METRIC, ATTACK, BENCHMARK = "halve", "scaled_ascent", "largest_loss", "shrinking", "two_people"


@pytest.fixture(scope="module", autouse=True)
def plugins() -> Iterator[None]:
    """One new entry in each registry."""

    @register_constraint(CONSTRAINT)
    @dataclass(frozen=True)
    class HalveConstraint(Constraint):
        """Half of each step, whatever the retain rows are."""

        share: float = 0.5

        def right(self, gram: Any) -> Scale:
            return Scale(gram.spectrum_I.new_full((gram.spectrum_I.numel(),), self.share))

    @register_loss(LOSS)
    def scaled_ascent(predictions: Predictions, original: None, *, scale: float = 1.0) -> Tensor:
        return -scale * predictions.nll_L

    @register_metric(METRIC)
    class LargestLoss(UnlearningMetric):
        """The largest loss of a row, in nats."""

        inputs = {"loss": NUMBER}

        @staticmethod
        def estimate(loss: Sequence[float], seed: int = 0) -> Estimate:
            return bootstrap([loss], np.max, seed)

    @register_attack(ATTACK)
    def shrinking(subject: Subject) -> Iterator[Outcome]:
        with restored(subject.model), torch.no_grad():
            for weight in subject.model.parameters():
                weight.mul_(0.5)
            score_N = subject.score(subject.rows["forget"])
        yield Outcome(f"shrunken_{subject.score_name}", "forget", bootstrap_mean(score_N), memory="more")

    register_benchmark(
        BENCHMARK,
        Benchmark(
            about="two invented people",
            defaults={"methods": LOSS, "constraints": CONSTRAINT, "metrics": METRIC, "attacks": ATTACK, "seeds": "0"},
            columns=(Column("worst", METRIC, "forget"), Column("shrunken", "shrunken_probability", "forget")),
        ),
    )
    yield
    for registry, name in (
        (CONSTRAINTS, CONSTRAINT),
        (LOSSES, LOSS),
        (METRICS, METRIC),
        (ATTACKS, ATTACK),
        (BENCHMARKS, BENCHMARK),
    ):
        registry.remove(name)


@pytest.fixture(autouse=True)
def quick_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_unlearn.publishing.model_folder.save_plots", lambda report, folder: [])


@pytest.fixture
def names(tmp_path: Path) -> dict[str, Any]:
    """A tiny model and eight rows of the invented people, two of them to forget."""
    model = tiny_model(tmp_path / "model")
    splits = {"train": "people[0:8]", "forget": "people[0:2]", "retrained": str(model)}
    places = {"model_name_or_path": str(model), "dataset_name": str(PEOPLE), "cache_dir": str(tmp_path / "cache")}
    return {**places, **splits}


def config_for(folder: Path, **changes: Any) -> UnlearningConfig:
    few = {"use_cpu": True, "disable_tqdm": True, "max_steps": 1, "eval_strategy": "no", "max_length": 32}
    return UnlearningConfig(str(folder), **{**few, **changes})


def test_a_run_and_an_audit_use_them_and_the_card_shows_them(names: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = config_for(out, loss=LOSS, constraint=CONSTRAINT, constraint_settings={"share": 0.25})
    report = run_request(RunArguments(**names, metrics=METRIC), config)[CONSTRAINT]
    assert report.method["constraint_settings"] == {"share": 0.25}
    assert report.method["loss"] == LOSS and report.get(METRIC, "forget") is not None
    finished = RunArguments(**{**names, "model_name_or_path": str(out)})
    audited = audit_finished(finished, None, ATTACK, AuditSettings(), batch_size=4, max_length=32)
    assert {metric.model for metric in audited.metrics} == {"unlearned", "retrained"}
    add_audit(audited, out)
    card = (out / "README.md").read_text()
    assert all(word in card for word in (CONSTRAINT, LOSS, METRIC, "shrunken_probability"))


def test_a_grid_uses_them_and_its_table_shows_them(names: dict[str, Any], tmp_path: Path) -> None:
    benchmark = BENCHMARKS.find(BENCHMARK)
    args = BenchmarkArguments(**{**names, **benchmark.defaults})
    results = run_grid(args, config_for(tmp_path), tmp_path / "grid")
    assert not results.failed
    (report,) = results.reports.values()
    write(BENCHMARK, benchmark, results, "the command", tmp_path / "grid")
    table = [line for line in (tmp_path / "grid" / "results.md").read_text().splitlines() if line.startswith("|")]
    assert table[0] == "| method | constraint | worst | shrunken | time, s | seeds |"
    assert table[-1].startswith(f"| {LOSS} | {CONSTRAINT} | ")
    worst, shrunken = report.get(METRIC, "forget"), report.get("shrunken_probability", "forget")
    assert worst is not None and f"{worst.value:.3f}" in table[-1] and shrunken is not None


@pytest.mark.parametrize(("field", "registry"), [("methods", "loss"), ("constraints", "constraint")])
def test_a_name_that_nobody_registered_is_refused(
    field: str, registry: str, names: dict[str, Any], tmp_path: Path
) -> None:
    """The negative control: names are looked up, not passed through."""
    arguments = {**names, "methods": LOSS, "constraints": CONSTRAINT, field: "unregistered"}
    with pytest.raises(SettingsError, match=f"unknown {registry} 'unregistered'"):
        grid_cells(BenchmarkArguments(**arguments), config_for(tmp_path))
