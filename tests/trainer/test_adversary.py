"""Laws of training against an attacker: gradients are taken at relearned weights, on rows that the attacker does not
have; the attack leaves no trace; relearning brings back less; rows are held from below and from above."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers.memorised import MEMORISED, mean_nll, memorised
from helpers.tiny import collate, text_rows, tiny_gpt2, tiny_llama
from helpers.training import FORGET, HOLDOUT, RETAIN, logits, settings, trained
from hf_unlearn.constraints.step_constrainer import StepConstrainer
from hf_unlearn.data.batches import PaddingCollator
from hf_unlearn.data.pairs import PairedCollator, attackers_rows
from hf_unlearn.errors import SettingsError
from hf_unlearn.evaluation.attacks.auditing import AuditSettings, audit
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.trainer.adversary import relearned_weights
from hf_unlearn.trainer.config import UnlearningConfig
from hf_unlearn.trainer.trainer import UnlearningTrainer

RATE = 0.01


def attacked_twin(model: nn.Module, rows: list[dict[str, Any]], steps: int) -> None:
    """Make sign steps on every trainable parameter, in place."""
    weights = [p for p in model.parameters() if p.requires_grad]
    for _ in range(steps):
        gradients = torch.autograd.grad(mean_nll(model, rows), weights)
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight -= RATE * gradient.sign()


def test_relearned_weights_are_those_of_sign_steps_and_last_for_the_context(double: None) -> None:
    model, twin = tiny_llama(), tiny_llama()
    constrainer = StepConstrainer(model, None, None)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = trained(model)
    attacked_twin(twin, FORGET, 3)
    with relearned_weights(model, constrainer, collate(FORGET), 3, RATE):
        for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert torch.allclose(parameter, other, atol=1e-12), name
        assert (trained(model)["lm_head.weight"] != before["lm_head.weight"]).any()  # negative control: they have moved
    assert all(torch.equal(value, before[name]) for name, value in trained(model).items())
    assert all((p.grad == 1).all() for p in model.parameters()), "the attack's gradients must not be added to others"


def test_weights_are_restored_after_an_error() -> None:
    model = tiny_gpt2()
    before = trained(model)
    with pytest.raises(RuntimeError, match="within"):
        with relearned_weights(model, StepConstrainer(model, None, None), collate(FORGET), 2, RATE):
            raise RuntimeError("within")
    assert all(torch.equal(value, before[name]) for name, value in trained(model).items())


def test_the_attacker_has_a_third_of_the_rows_and_no_other_batch_has_them() -> None:
    few, others = attackers_rows(text_rows(7))
    assert (len(few), len(others)) == (3, 4)
    assert not any(row in others for row in few)
    assert attackers_rows(text_rows(1)) == (text_rows(1), text_rows(1))
    batch = PairedCollator(PaddingCollator(), attacker=True)([{"forget": r, "retain": r} for r in text_rows(6)])
    assert {name: len(part["labels"]) for name, part in batch.items()} == {"relearn": 2, "forget": 4, "retain": 4}
    assert "relearn" not in PairedCollator(PaddingCollator())([{"forget": r} for r in text_rows(6)])


@pytest.mark.parametrize("steps", [0, 2])
def test_a_step_has_the_gradient_at_relearned_weights_on_the_other_rows(steps: int, tmp_path: Path) -> None:
    """Compare one SGD step of `grad_ascent` with a twin's; without relearning the gradient is on all rows."""
    model, twin = tiny_llama(), tiny_llama()
    args = settings(
        tmp_path,
        max_steps=1,
        loss="grad_ascent",
        constraint="none",
        relative_step=False,
        learning_rate=0.1,
        momentum=0.0,
        max_grad_norm=0.0,
        per_device_train_batch_size=len(FORGET),
        adversary_steps=steps,
        adversary_learning_rate=RATE,
        train_only=["*mlp*"],
    )
    trainer = UnlearningTrainer(model, args, FORGET)
    order = next(iter(trainer.get_train_dataloader()))["relearn" if steps else "forget"]["input_ids"]
    before = trained(model)
    trainer.train()
    for name, parameter in twin.named_parameters():
        parameter.requires_grad_("mlp" in name and parameter.ndim > 1)
    few, others = ([], FORGET) if not steps else _by_first(FORGET, order)
    attacked_twin(twin, few, steps)
    mean_nll(twin, others).backward()
    for name, parameter in twin.named_parameters():
        step = trained(model)[name] - before[name]
        expected = torch.zeros_like(step) if parameter.grad is None else 0.1 * parameter.grad
        assert torch.allclose(step, expected, atol=2e-5 + 1e-3 * expected.abs().max().item()), name


def _by_first(rows: list[dict[str, Any]], chosen: Tensor) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows whose tokens are in `chosen`, and the others."""
    tokens = [[token for token in row.tolist() if token] for row in chosen]
    return [r for r in rows if r["input_ids"] in tokens], [r for r in rows if r["input_ids"] not in tokens]


def test_retain_logits_stay_the_same_under_energy_one(tmp_path: Path) -> None:
    model = tiny_llama()
    before, forget = logits(model, RETAIN), logits(model, FORGET)
    args = settings(tmp_path, adversary_steps=2, adversary_learning_rate=RATE, per_device_train_batch_size=4)
    UnlearningTrainer(model, args, FORGET, RETAIN).train()
    assert (logits(model, RETAIN) - before).abs().max() < 1e-4
    assert (logits(model, FORGET) - forget).abs().max() > 1e-2


def test_stopping_uses_the_metric_after_relearning(tmp_path: Path) -> None:
    model = memorised()
    args = attacked(tmp_path, max_steps=40, eval_strategy="steps", eval_steps=1, forget_target=0.3)
    trainer = UnlearningTrainer(model, args, MEMORISED, statistics=collect_statistics(model, RETAIN, progress=False))
    trainer.train()
    reached = [log for log in trainer.state.log_history if "eval_forget_relearned_probability" in log]
    assert trainer.stop_reason.startswith("forget relearned_probability")
    assert reached[-1]["eval_forget_relearned_probability"] <= 0.3
    assert all(log["eval_forget_relearned_probability"] > 0.3 for log in reached[:-1])
    assert any(log["eval_forget_probability"] <= 0.3 for log in reached[:-1]), (
        "the rule without an attacker would have stopped earlier"
    )


def test_an_attack_brings_back_less_after_training_against_an_attacker(tmp_path: Path) -> None:
    """Both runs stop at 0.1; only one stays there after an attack that neither has seen."""
    back = {}
    for steps in (0, 3):
        model = memorised()
        args = attacked(tmp_path, max_steps=60, eval_strategy="steps", eval_steps=1, forget_target=0.1)
        args = args.but(adversary_steps=steps)
        statistics = collect_statistics(model, RETAIN, progress=False)
        UnlearningTrainer(model, args, MEMORISED, statistics=statistics).train()
        how = AuditSettings(relearn_rows=4, relearn_steps=8, relearn_learning_rate=2e-3)
        report = audit(model, {"forget": MEMORISED}, attacks=["relearning"], settings=how, collator=PaddingCollator())
        back[steps] = next(m.value for m in report.metrics if m.name == "relearned_probability")
    assert back[3] <= 0.1 < back[0], back


def test_a_run_against_an_attacker_ends_with_rows_neither_above_nor_far_below_the_mark(tmp_path: Path) -> None:
    """Both bounds hold at the last evaluation and at none before; the control has a fixed target and no lower bound."""
    last = {}
    for mark in ("of held-out rows", "fixed"):
        model = memorised()
        how = {"forget_target": 0.02} if mark == "fixed" else {}
        args = attacked(tmp_path, max_steps=80, eval_strategy="steps", eval_steps=1, momentum=0.0, **how)
        statistics = collect_statistics(model, RETAIN, progress=False)
        trainer = UnlearningTrainer(model, args, MEMORISED, statistics=statistics, holdout_dataset=HOLDOUT)
        trainer.set_stopping_rows(MEMORISED, 0.2)
        trainer.train()
        names = ("eval_forget_probability", "eval_forget_relearned_probability")
        logs = [tuple(log[name] for name in names) for log in trainer.state.log_history if names[1] in log]
        assert trainer.stop_reason.startswith("forget relearned_probability")
        last[mark] = logs[-1]
        if mark != "fixed":
            both = [plain >= 0.1 and relearned <= 0.2 for plain, relearned in logs]
            assert both[-1] and not any(both[:-1])
    assert last["fixed"][0] < 0.1


def test_bounds_come_from_the_held_out_probability_whatever_the_metric(tmp_path: Path) -> None:
    bounds = {}
    for metric in ("probability", "accuracy", "loss"):
        args = settings(tmp_path, max_steps=1, adversary_steps=1, forget_metric=metric)
        trainer = UnlearningTrainer(tiny_gpt2(), args, FORGET, RETAIN, holdout_dataset=HOLDOUT)
        trainer.train()
        stopping = trainer._stopping_callback()
        assert stopping is not None and stopping.row_stopping is not None
        bounds[metric] = (stopping.row_stopping.lowest, stopping.row_stopping.mark)
    assert bounds["accuracy"] == bounds["loss"] == bounds["probability"]


def attacked(folder: Path, **changes: Any) -> UnlearningConfig:
    base = {
        "adversary_steps": 3,
        "adversary_learning_rate": 3e-3,
        "per_device_train_batch_size": 12,
        "learning_rate": 5e-3,
    }
    return settings(folder, **{**base, "loss": "ce_u", "constraint_settings": {"energy": 0.9}, **changes})


@pytest.mark.parametrize(("name", "value"), [("adversary_steps", -1), ("adversary_learning_rate", 0.0)])
def test_settings_out_of_range_are_refused(name: str, value: float, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="adversary_steps must not be negative and adversary_learning_rate above 0"):
        settings(tmp_path, **{name: value})


def test_held_out_rows_are_scored_without_an_attack(tmp_path: Path) -> None:
    model = tiny_gpt2()
    trainer = UnlearningTrainer(
        model,
        settings(tmp_path, adversary_steps=2, adversary_learning_rate=RATE),
        FORGET,
        RETAIN,
        holdout_dataset=HOLDOUT,
    )
    plain = UnlearningTrainer(tiny_gpt2(), settings(tmp_path), FORGET, RETAIN, holdout_dataset=HOLDOUT)
    assert trainer._stopping_score("holdout") == plain._stopping_score("holdout")
    assert trainer._stopping_score("forget") != plain._stopping_score("forget")
