"""A constraint, a loss and a metric from outside the package train, and the card describes them without an edit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.tiny import tiny_llama
from helpers.training import FORGET, RETAIN, settings, trained
from hf_unlearn import Constraint, UnlearningReport, UnlearningTrainer, register_constraint, register_loss
from hf_unlearn.constraints.factors import Factor, Scale
from hf_unlearn.constraints.registry import CONSTRAINTS
from hf_unlearn.evaluation.report import MetricValue
from hf_unlearn.losses import LOSSES
from hf_unlearn.models.forward import Predictions
from hf_unlearn.publishing import render_card
from hf_unlearn.statistics.eigen import Eigen


@pytest.fixture
def plugins() -> Iterator[None]:
    """The constraint `first_inputs` and the loss `square_root`, registered for one test."""

    @register_constraint("first_inputs")
    @dataclass(frozen=True)
    class FirstInputs(Constraint):
        """Steps that leave the first inputs of each layer alone: `D diag(0, ..., 0, 1, ..., 1)`.

        This line is not on the card.
        """

        count: int = 3

        def right(self, gram: Eigen) -> Factor:
            kept_I = torch.ones_like(gram.spectrum_I, dtype=torch.float32)
            kept_I[: self.count] = 0
            return Scale(kept_I)

    @register_loss("square_root")
    def square_root(predictions: Predictions, original: None, *, offset: float = 1e-3) -> Tensor:
        """Return the square root of `p + offset` per label, p its probability.

        This line is not on the card.
        """
        return ((-predictions.nll_L).exp() + offset).sqrt()

    yield
    CONSTRAINTS.remove("first_inputs")
    LOSSES.remove("square_root")


def run(folder: Path, **changes: object) -> UnlearningTrainer:
    """Six SGD steps, each the optimizer's own."""
    model = tiny_llama()
    args = settings(folder, constraint_settings=None, relative_step=False, learning_rate=0.1, **changes)
    trainer = UnlearningTrainer(model, args, FORGET, RETAIN)
    trainer.train()
    return trainer


def moved_inputs(trainer: UnlearningTrainer) -> Tensor:
    """The largest move of a weight in each column of the first layer's query projection."""
    name = "model.layers.0.self_attn.q_proj.weight"
    return (trained(trainer.model)[name] - trained(tiny_llama())[name]).abs().amax(0)


def rows_of(card: str) -> dict[str, str]:
    """Second cell by first cell of the card's two-column tables."""
    cells = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| ")]
    return {row[0]: row[1] for row in cells if len(row) == 2}


def test_a_constraint_from_outside_is_enforced_on_every_step(plugins: None, tmp_path: Path) -> None:
    moved_I = moved_inputs(run(tmp_path, constraint="first_inputs", loss="square_root"))
    assert (moved_I[:3] == 0).all() and (moved_I[3:] > 0).all()
    # negative control: without the constraint the first inputs move too
    assert (moved_inputs(run(tmp_path, constraint="none", loss="square_root"))[:3] > 0).all()


def test_a_loss_from_outside_lowers_the_probability_of_the_forget_rows(plugins: None, tmp_path: Path) -> None:
    trainer = run(tmp_path, constraint="none", loss="square_root", loss_settings={"offset": 0.01})
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] and trainer.loss.settings == {"offset": 0.01}


def test_the_card_describes_what_the_package_does_not_know(plugins: None, tmp_path: Path) -> None:
    trainer = run(tmp_path, constraint="first_inputs", loss="square_root")
    report = trainer.report()
    report.metrics.append(MetricValue("poems_recited", 0.125, "forget", "unlearned", 4))
    report.save(tmp_path)
    card = render_card(UnlearningReport.load(tmp_path), model_name="me/model")
    rows = rows_of(card)
    assert rows["constraint"] == "first_inputs" and rows["loss"] == "square_root"
    assert rows["what the constraint allows"] == (
        "Steps that leave the first inputs of each layer alone: `D diag(0, ..., 0, 1, ..., 1)`."
    )
    assert rows["what the loss computes"] == "the square root of `p + offset` per label, p its probability."
    assert rows["settings of the constraint"] == "count = 3"
    assert rows["retained energy: what steps may not change"] == "no cut by energy with this constraint"
    assert "| poems_recited | forget | not measured | 0.125 | not measured | 4 |" in card
    assert "not on the card" not in card
    tags = card.split("---")[1]
    assert "first_inputs" in tags and "square_root" in tags
    # negative control: the words come from the classes and not from the card
    assert "first_inputs" not in render_card(UnlearningReport(), model_name="me/model")


def test_a_constraint_from_outside_that_protects_directions_says_how_many(plugins: None, tmp_path: Path) -> None:
    class ProtectsTwo(CONSTRAINTS["first_inputs"]):  # type: ignore[misc]
        """Steps that leave the first inputs alone."""

        def protected_rank(self, gram: Eigen) -> int:
            return 2

    CONSTRAINTS.remove("first_inputs")
    register_constraint("first_inputs")(ProtectsTwo)
    report = run(tmp_path, constraint="first_inputs", loss="square_root").report()
    row = rows_of(render_card(report, model_name="m"))["retained energy: what steps may not change"]
    assert "of the energy of the inputs, in" in row and "spectrum" not in row


def test_a_run_of_a_plugin_resumes_and_is_refused_with_other_settings(plugins: None, tmp_path: Path) -> None:
    changes = {"constraint": "first_inputs", "loss": "square_root", "save_strategy": "steps", "save_steps": 3}
    whole = run(tmp_path, **changes)
    model = tiny_llama()
    args = settings(tmp_path, constraint_settings=None, relative_step=False, learning_rate=0.1, **changes)
    resumed = UnlearningTrainer(model, args, FORGET, RETAIN)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    wanted = trained(whole.model)
    assert all(torch.equal(weight, wanted[name]) for name, weight in trained(model).items())
    sealed = json.loads((tmp_path / "checkpoint-3" / "unlearning_state.json").read_text())["run"]
    assert sealed["constraint"]["name"] == "first_inputs" and sealed["loss"]["name"] == "square_root"
