"""Laws of `UnlearningTrainer`: retain outputs do not change, whatever the optimizer does, and runs stop in time. Each
guarantee has a negative control."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import TrainerControl

from helpers import model_kinds as kinds
from helpers.tiny import CLASSES, image_rows, tiny_gpt2, tiny_llama, tiny_vit, vector_rows
from helpers.training import FORGET, HOLDOUT, RETAIN, logits, moved, settings, trained
from hf_unlearn.data.batches import PaddingCollator
from hf_unlearn.errors import DataError, NonFiniteLossError, SettingsError, StatisticsError
from hf_unlearn.evaluation.row_scores import score_rows
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.trainer.config import UnlearningConfig
from hf_unlearn.trainer.stopping import OverUnlearningCallback
from hf_unlearn.trainer.trainer import UnlearningTrainer

MODELS = {"gpt2": tiny_gpt2, "llama": tiny_llama}


# With these optimizer settings a step is not a multiple of the gradient, and the guarantee must hold all the same.
HARD = {"weight_decay": 0.1, "gradient_accumulation_steps": 2, "max_grad_norm": 1.0, "per_device_train_batch_size": 1}


@pytest.mark.parametrize("relative", [False, True], ids=["own step", "relative step"])
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
@pytest.mark.parametrize("name", MODELS)
def test_energy_one_keeps_every_retain_logit_and_moves_forget_logits(
    name: str, optim: str, relative: bool, tmp_path: Path
) -> None:
    model = MODELS[name](dropout=0.1)
    rate = 1e-2 if relative or optim == "adamw_torch" else 0.1
    args = settings(tmp_path, optim=optim, relative_step=relative, learning_rate=rate, **HARD)
    retain, forget, trainer = moved(model, args)
    assert trainer.state.global_step == 6
    assert retain < 1e-5 * max(1.0, logits(model, RETAIN).abs().max().item())
    assert forget > 1e-2
    assert trainer.coverage.protected and not trainer.coverage.exposed


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
@pytest.mark.parametrize("name", MODELS)
def test_without_constraint_retain_logits_move(name: str, optim: str, tmp_path: Path) -> None:
    args = settings(tmp_path, optim=optim, constraint="none", learning_rate=1e-2, **HARD)
    retain, forget, trainer = moved(MODELS[name](dropout=0.1), args)
    assert retain > 1e-2 and forget > 1e-2
    assert trainer.coverage.exposed and not trainer.coverage.protected


def test_bf16_autocast_keeps_the_guarantee(tmp_path: Path) -> None:
    """The weights keep it exactly; a bf16 forward pass adds its own rounding, to the original logits too."""

    def changes(constraint: str) -> dict[str, float]:
        model = tiny_llama()
        before = {"retain": logits(model, RETAIN), "forget": logits(model, FORGET)}
        args = settings(tmp_path, bf16=True, learning_rate=1e-2, constraint=constraint)
        trainer = UnlearningTrainer(model, args, FORGET, RETAIN)
        trainer.train()
        assert next(model.parameters()).dtype == torch.float32
        rounded = logits(model, RETAIN)  # the trainer leaves the forward pass in autocast
        plain = tiny_llama(seed=1)
        plain.load_state_dict(model.state_dict())
        rows = {"retain": RETAIN, "forget": FORGET}
        exact = {name: (logits(plain, rows[name]) - before[name]).abs().max().item() for name in rows}
        return exact | {"rounded": (rounded - before["retain"]).abs().max().item()}

    kept, free = changes("energy"), changes("none")
    assert kept["retain"] < 1e-5 and kept["rounded"] < 5e-2 and kept["forget"] > 1e-2
    assert free["retain"] > 1e-2


@pytest.mark.parametrize("loss", ["ce_u", "npo", "pgu"])
def test_accumulating_rows_of_unequal_length_gives_the_step_of_one_batch(loss: str, tmp_path: Path) -> None:
    assert len({len(row["input_ids"]) for row in FORGET}) == 4

    def step(batch: int, accumulate: int) -> dict[str, Tensor]:
        model = tiny_llama()
        args = settings(
            tmp_path,
            loss=loss,
            learning_rate=1e-2,
            max_steps=1,
            relative_step=False,
            max_grad_norm=0.0,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            constraint="none",
        )
        trainer = UnlearningTrainer(model, args, FORGET)
        trainer.train()
        assert trainer.state.global_step == 1
        return trained(model)

    start, one_batch, accumulated = trained(tiny_llama()), step(4, 1), step(1, 4)
    assert max((one_batch[n] - start[n]).abs().max().item() for n in one_batch) > 2e-5
    for name in one_batch:
        torch.testing.assert_close(accumulated[name], one_batch[name], atol=1e-6, rtol=1e-5)


def test_log_lines_have_drift_leak_and_predicted_divergence(tmp_path: Path) -> None:
    model = tiny_gpt2()
    statistics = collect_statistics(model, RETAIN, fisher=True, progress=False)
    trainer = UnlearningTrainer(model, settings(tmp_path, max_steps=3), FORGET, statistics=statistics)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 3
    for line in lines:
        assert 0 <= line["retain_drift"] < 1e-5 and 0 <= line["leak"] < 1e-3 and abs(line["retain_kl"]) < 1e-6


def test_log_lines_of_an_unconstrained_run_show_the_drift(tmp_path: Path) -> None:
    model = tiny_gpt2()
    statistics = collect_statistics(model, RETAIN, progress=False)
    args = settings(tmp_path, constraint="none", max_steps=3, learning_rate=1e-2)
    trainer = UnlearningTrainer(model, args, FORGET, statistics=statistics)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    drifts = [line["retain_drift"] for line in lines]
    assert drifts[0] > 1e-3 and drifts == sorted(drifts)
    assert all("leak" not in line and "retain_kl" not in line for line in lines)


def test_evaluation_of_a_dict_equals_the_row_scores_of_each_split(tmp_path: Path) -> None:
    model = tiny_llama()
    trainer = UnlearningTrainer(
        model,
        settings(tmp_path, per_device_eval_batch_size=3),
        FORGET,
        RETAIN,
        eval_dataset={"forget": FORGET, "holdout": HOLDOUT},
    )
    metrics = trainer.evaluate()
    for split, rows in (("forget", FORGET), ("holdout", HOLDOUT)):
        scores = score_rows(model, rows, PaddingCollator(), batch_size=1)
        for metric in ("loss", "probability", "accuracy", "entropy"):
            expected = getattr(scores, metric).mean()
            assert metrics[f"eval_{split}_{metric}"] == pytest.approx(expected, rel=1e-5), (split, metric)
    assert metrics["eval_forget_loss"] != metrics["eval_holdout_loss"]


def test_a_saved_folder_has_no_pickle_and_loads_to_the_same_logits(tmp_path: Path) -> None:
    model = tiny_gpt2()
    trainer = UnlearningTrainer(model, settings(tmp_path / "out", max_steps=2), FORGET, RETAIN)
    trainer.train()
    trainer.save_model()
    names = sorted(p.name for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert "model.safetensors" in names and "config.json" in names
    assert not [n for n in names if n.endswith((".bin", ".pt", ".pkl", ".pth", ".ckpt"))]
    again = type(model).from_pretrained(tmp_path / "out").eval()
    torch.testing.assert_close(logits(again, FORGET), logits(model, FORGET), atol=1e-6, rtol=1e-6)
    assert (logits(again, FORGET) - logits(tiny_gpt2(), FORGET)).abs().max() > 1e-4


def test_an_optimizer_gets_its_hooks_only_once(tmp_path: Path) -> None:
    trainer = UnlearningTrainer(tiny_gpt2(), settings(tmp_path, max_steps=1), FORGET, RETAIN)
    attached: list[Any] = []
    attach = trainer.constrainer.attach
    trainer.constrainer.attach = lambda optimizer: (attached.append(optimizer), attach(optimizer))  # type: ignore
    first = trainer.create_optimizer()
    assert trainer.create_optimizer() is first and len(attached) == 1
    trainer.train()
    trainer.train()
    assert len(attached) == len({id(optimizer) for optimizer in attached})
    for optimizer in attached:
        assert len(optimizer._optimizer_step_pre_hooks) == 1
        ours = [h for h in optimizer._optimizer_step_post_hooks.values() if h.__self__ is trainer.constrainer]
        assert len(ours) == 1


class Line:
    """A stand-in for a StepConstrainer: its weights are one number, and the metric is a function of that number."""

    def __init__(self, forget: Callable[[float], float], holdout: float = 0.3) -> None:
        self.weight, self.forget, self.holdout, self.scored = torch.zeros(()), forget, holdout, 0

    def copy_weights(self) -> list[Tensor]:
        return [self.weight.clone()]

    def restore(self, weights: list[Tensor]) -> None:
        self.weight = weights[0].clone()

    @contextmanager
    def original(self) -> Iterator[None]:
        kept, self.weight = self.weight, torch.zeros(())
        yield
        self.weight = kept

    def score(self, split: str) -> float:
        self.scored += 1
        return self.forget(self.weight.item()) if split == "forget" else self.holdout + self.weight.item()


def walk(line: Line, metric: str = "probability", target: float | None = None) -> tuple[OverUnlearningCallback, int]:
    """Take up to 9 steps of length 1, each with an evaluation, until the callback stops; return their number."""
    callback, control = OverUnlearningCallback(line, metric, line.score, target), TrainerControl()  # type: ignore
    callback.on_train_begin(None, SimpleNamespace(global_step=0), control)  # type: ignore[arg-type]
    for step in range(1, 10):
        line.weight = torch.tensor(float(step))
        metrics = {f"eval_forget_{metric}": line.forget(step)}
        callback.on_evaluate(None, SimpleNamespace(global_step=step), control, metrics)  # type: ignore[arg-type]
        if control.should_training_stop:
            return callback, step
    return callback, 9


def test_the_last_step_is_halved_until_it_ends_just_beyond_the_mark() -> None:
    line = Line(lambda w: 0.9 - 0.2 * w)  # reaches 0.3 at w = 3
    callback, step = walk(line)
    assert step == 3 and line.weight == 3  # reached exactly
    line = Line(lambda w: 0.9 - 0.25 * w)  # reaches 0.3 at w = 2.4
    callback, step = walk(line)
    assert step == 3 and 2.4 <= line.weight <= 2.48 and f"step {line.weight:g}" in (callback.reason or "")
    line = Line(
        lambda w: 0.9 if w < 2.001 else 0.0
    )  # a cliff: the result of the last halving is kept, and not the end of the step
    callback, step = walk(line)
    assert step == 3 and line.weight == 2 + 2**-6
    assert callback.mark == 0.3  # that of the original weights, although the metric of held-out rows has changed since


def test_the_first_step_is_shortened_like_any_other() -> None:
    line = Line(lambda w: 0.9 - 0.8 * w)
    assert walk(line)[1] == 1 and 0.75 <= line.weight <= 0.775


def test_a_run_whose_rows_are_forgotten_at_the_start_takes_no_step() -> None:
    line, control = Line(lambda w: 0.1), TrainerControl()
    callback = OverUnlearningCallback(line, "probability", line.score)  # type: ignore[arg-type]
    state = SimpleNamespace(global_step=0)
    callback.on_train_begin(None, state, control)  # type: ignore[arg-type]
    callback.on_evaluate(None, state, control, {"eval_forget_probability": 0.1})  # type: ignore[arg-type]
    assert control.should_training_stop and line.weight == 0 and line.scored == 1


def test_forget_above_the_mark_never_stops() -> None:
    line = Line(lambda w: 0.31)
    callback, step = walk(line)
    assert step == 9 and line.weight == 9 and callback.reason is None


def test_a_loss_rises_to_its_mark() -> None:
    line = Line(lambda w: w, holdout=2.2)
    assert walk(line, "loss")[1] == 3 and 2.2 <= line.weight <= 2.22


def test_a_target_needs_no_scores_and_keeps_the_entire_step() -> None:
    line = Line(lambda w: 0.9 - 0.25 * w)
    callback, step = walk(line, target=0.3)
    assert step == 3 and line.weight == 3 and line.scored == 0 and "the target 0.3" in (callback.reason or "")


def test_evaluations_of_other_splits_do_not_stop_a_run() -> None:
    line, control = Line(lambda w: 0.0), TrainerControl()
    callback = OverUnlearningCallback(line, "probability", line.score)  # type: ignore[arg-type]
    state = SimpleNamespace(global_step=1)
    callback.on_train_begin(None, state, control)  # type: ignore[arg-type]
    callback.on_evaluate(None, state, control, {"eval_retain_probability": 0.0})  # type: ignore[arg-type]
    assert not control.should_training_stop


def test_a_run_stops_when_forget_rows_reach_the_original_loss_of_held_out_rows(tmp_path: Path) -> None:
    model = tiny_llama()
    start, mark = (score_rows(model, rows, PaddingCollator()).loss.mean() for rows in (FORGET, HOLDOUT))
    assert start < mark - 0.1
    args = settings(
        tmp_path,
        max_steps=40,
        learning_rate=2e-2,
        loss="grad_ascent",
        forget_metric="loss",
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=1,
    )
    trainer = UnlearningTrainer(model, args, FORGET, RETAIN, holdout_dataset=HOLDOUT)
    trainer.train()
    loss = score_rows(model, FORGET, PaddingCollator()).loss.mean()
    ends = [line["eval_forget_loss"] for line in trainer.state.log_history if "eval_forget_loss" in line]
    assert 0 < trainer.state.global_step < 40 and "held-out rows had before" in trainer.stop_reason
    assert mark <= loss <= ends[-1] and (len(ends) == 1 or loss < mark + 0.03)


def test_a_target_needs_no_holdout_rows(tmp_path: Path) -> None:
    model = tiny_llama()
    target = float(score_rows(model, FORGET, PaddingCollator()).loss.mean() + 0.5)
    args = settings(
        tmp_path, max_steps=40, learning_rate=2e-2, loss="grad_ascent", forget_metric="loss", forget_target=target
    )
    trainer = UnlearningTrainer(model, args, FORGET, RETAIN)
    trainer.train()
    assert 0 < trainer.state.global_step < 40 and "reached the target" in trainer.stop_reason
    assert score_rows(model, FORGET, PaddingCollator()).loss.mean() >= target


def test_a_drift_budget_is_never_exceeded(tmp_path: Path) -> None:
    def run(budget: float | None) -> UnlearningTrainer:
        model = tiny_gpt2()
        args = settings(
            tmp_path,
            constraint="ridge",
            constraint_settings=None,
            learning_rate=1e-2,
            max_steps=12,
            max_retain_drift=budget,
        )
        trainer = UnlearningTrainer(model, args, FORGET, RETAIN)
        trainer.train()
        return trainer

    free = run(None)
    budget = free.constrainer.drift().relative / 2
    assert budget > 0 and free.state.global_step == 12
    bounded = run(budget)
    assert bounded.state.global_step < 12 and "max_retain_drift" in bounded.stop_reason
    assert 0 < bounded.constrainer.drift().relative <= budget


def test_a_nan_loss_raises_and_restores_the_original_weights(nan_after_first: str, tmp_path: Path) -> None:
    model = tiny_gpt2()
    before = trained(model)
    trainer = UnlearningTrainer(model, settings(tmp_path, loss=nan_after_first, learning_rate=0.1), FORGET, RETAIN)
    with pytest.raises(NonFiniteLossError, match="the loss is nan after step 1"):
        trainer.train()
    for name, weight in trained(model).items():
        assert weight.isfinite().all() and torch.equal(weight, before[name]), name


def build(tmp_path: Path, forget: Any = FORGET, retain: Any = None, statistics: Any = None, **changes: Any) -> None:
    splits = changes.pop("eval_dataset", None)
    args = settings(tmp_path, **changes)
    UnlearningTrainer(tiny_gpt2(), args, forget, retain, statistics=statistics, eval_dataset=splits)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, SettingsError, "needs statistics"),
        ({"retain": [*RETAIN, FORGET[1]]}, DataError, "1 forget rows are also in the retain set"),
        ({"retain": RETAIN, "forget": []}, DataError, "forget set is empty"),
        ({"retain": RETAIN, "forget": None}, DataError, "forget set is empty"),
        ({"retain": RETAIN, "loss": "oblivion"}, SettingsError, "unknown loss 'oblivion'"),
        ({"retain": RETAIN, "constraint": "wishful"}, SettingsError, "unknown constraint 'wishful'"),
        ({"retain": RETAIN, "constraint_settings": {"energy": 0.0}}, SettingsError, "energy"),
        ({"retain": RETAIN, "constraint_settings": {"power": 1}}, SettingsError, "power"),
        ({"retain": RETAIN, "forget_metric": "vibes"}, SettingsError, "forget_metric"),
        ({"loss": "grad_diff", "constraint": "none"}, SettingsError, "needs retain rows"),
        ({"retain": RETAIN, "eval_dataset": HOLDOUT}, SettingsError, "name its splits"),
        ({"constraint": "none", "max_retain_drift": 0.1}, SettingsError, "max_retain_drift needs statistics"),
    ],
    ids=lambda value: next(iter(value), "nothing") if isinstance(value, dict) else None,
)
def test_a_wrong_argument_is_refused_with_the_reason(
    options: dict, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        build(tmp_path, **options)


def test_statistics_of_another_model_are_refused(tmp_path: Path) -> None:
    statistics = collect_statistics(tiny_gpt2(seed=1), RETAIN, progress=False)
    with pytest.raises(StatisticsError):
        build(tmp_path, statistics=statistics)
    build(tmp_path, statistics=collect_statistics(tiny_gpt2(), RETAIN, progress=False))


def test_grad_diff_reads_paired_retain_rows_and_keeps_their_loss_low(tmp_path: Path) -> None:
    def retain_loss(loss: str) -> float:
        model = tiny_gpt2()
        args = settings(tmp_path, loss=loss, constraint="none", max_steps=8, learning_rate=1e-2)
        trainer = UnlearningTrainer(model, args, FORGET, RETAIN)
        assert ("retain" in trainer.train_dataset[0]) == (loss == "grad_diff")
        trainer.train()
        return float(score_rows(model, RETAIN, PaddingCollator()).loss.mean())

    assert retain_loss("grad_diff") < retain_loss("grad_ascent") - 0.1


class Normed(nn.Module):
    """Classifier with a batch norm between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES)

    def forward(self, pixel_values: Tensor, **ignored: Any) -> Tensor:
        return self.second(torch.tanh(self.norm(self.first(pixel_values))))


def test_forget_batches_do_not_change_batch_norm_statistics(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Normed()
    with torch.no_grad():
        model(torch.randn(32, 6))
    before, weight = {n: b.clone() for n, b in model.named_buffers()}, model.second.weight.detach().clone()
    forget, retain = vector_rows(4, 1), vector_rows(3, 2)
    args = settings(tmp_path, loss="grad_diff", learning_rate=1e-2)
    UnlearningTrainer(model, args, forget, retain).train()
    assert not torch.equal(model.second.weight, weight)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), name
    model.train()(torch.randn(8, 6))
    assert not torch.equal(
        model.norm.running_mean, before["norm.running_mean"]
    )  # negative control: a forward pass in training mode changes it


def test_retain_logits_of_images_stay_the_same_too(tmp_path: Path) -> None:
    model, retain, forget = tiny_vit(width=32), image_rows(2, 1), image_rows(4, 2)
    pixels = [torch.stack([row["pixel_values"] for row in rows]) for rows in (retain, forget)]
    before = [model(p).logits.detach() for p in pixels]
    UnlearningTrainer(model, settings(tmp_path, learning_rate=1e-2), forget, retain).train()
    model.eval()
    changes = [(model(p).logits - b).abs().max().item() for p, b in zip(pixels, before, strict=True)]
    assert changes[0] < 1e-4 and changes[1] > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_counts_rows_once_and_keeps_the_guarantee(name: str, tmp_path: Path) -> None:
    plain, checkpointed = MODELS[name](), MODELS[name]()
    checkpointed.gradient_checkpointing_enable()
    checkpointed.train()
    first, second = (collect_statistics(m, RETAIN, fisher=True, progress=False) for m in (plain, checkpointed))
    assert first.positions == second.positions and first.rows == second.rows
    for layer in first.layers:
        torch.testing.assert_close(second.gram(layer), first.gram(layer), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(second.fisher(layer), first.fisher(layer), rtol=1e-5, atol=1e-12)
    args = settings(tmp_path, gradient_checkpointing=True, learning_rate=1e-2, optim="adamw_torch")
    retain, forget, _ = moved(MODELS[name](), args)
    assert retain < 1e-5 and forget > 1e-2


def test_bf16_weights_are_anchored(tmp_path: Path) -> None:
    """bf16 has 8 significant bits: the anchor keeps the move in the allowed space up to rounding, after any number of
    steps."""

    def drift(steps: int, constraint: str) -> float:
        model = tiny_llama().to(torch.bfloat16)
        args = settings(tmp_path, max_steps=steps, learning_rate=2e-2, constraint=constraint)
        trainer = UnlearningTrainer(
            model, args, FORGET, RETAIN, statistics=collect_statistics(model, RETAIN, progress=False)
        )
        trainer.train()
        assert next(model.parameters()).dtype == torch.bfloat16
        return trainer.constrainer.drift().relative

    short, long = drift(5, "energy"), drift(60, "energy")
    assert short < 5e-3 and long < 5e-3 and drift(60, "none") > 20 * long


def test_the_learning_rate_falls_exponentially_to_its_final_value(tmp_path: Path) -> None:
    args = settings(tmp_path, max_steps=8, learning_rate=0.04, final_learning_rate=0.01, logging_steps=1)
    trainer = UnlearningTrainer(tiny_gpt2(), args, FORGET, RETAIN)
    trainer.train()
    rates = [line["learning_rate"] for line in trainer.state.log_history if "learning_rate" in line]
    assert len(rates) == 8 and rates == sorted(rates, reverse=True)
    ratios = [rates[k + 1] / rates[k] for k in range(7)]
    assert ratios == pytest.approx([0.25 ** (1 / 8)] * 7)
    assert trainer.lr_scheduler.get_last_lr()[0] == pytest.approx(0.01)
    with pytest.raises(SettingsError, match="never reaches 0"):
        settings(tmp_path, final_learning_rate=0.0)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("learning_rate", -1.0, "learning_rate must be at least 0 and finite, got -1.0"),
        ("learning_rate", float("nan"), "learning_rate must be at least 0 and finite, got nan"),
        ("momentum", 1.0, "momentum must be at least 0 and below 1, got 1.0"),
        ("weight_decay", -0.1, "weight_decay must be at least 0 and finite"),
        ("per_device_train_batch_size", 0, "per_device_train_batch_size must be at least 1 and finite, got 0"),
        ("gradient_accumulation_steps", 0, "gradient_accumulation_steps must be at least 1"),
        ("max_retain_drift", -1.0, "max_retain_drift must be at least 0"),
        ("seed", -1, "seed must be at least 0 and below 4294967296, got -1"),
    ],
)
def test_a_setting_out_of_range_is_reported_before_anything_is_loaded(
    tmp_path: Path, name: str, value: float, message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        settings(tmp_path, **{name: value})


def test_a_retain_drop_is_never_exceeded(tmp_path: Path) -> None:
    """With the budget the weights of the last evaluation within it are kept; without it the run loses more."""

    def run(budget: float | None) -> tuple[float, UnlearningTrainer]:
        model = tiny_gpt2()
        before = score_rows(model, FORGET, PaddingCollator()).loss.mean()  # rows that certainly get worse
        args = settings(
            tmp_path,
            constraint="none",
            constraint_settings=None,
            loss="grad_ascent",
            learning_rate=1e-2,
            max_steps=12,
            eval_strategy="steps",
            eval_steps=1,
            forget_metric="loss",
            max_retain_drop=budget,
        )
        trainer = UnlearningTrainer(model, args, FORGET, RETAIN, eval_dataset={"retain": FORGET})
        trainer.train()
        return float(score_rows(model, FORGET, PaddingCollator()).loss.mean() - before), trainer

    free, _ = run(None)
    assert free > 0.1
    lost, trainer = run(free / 2)
    assert lost <= free / 2 and "max_retain_drop" in trainer.stop_reason
    assert 1 < trainer.state.global_step < 12
    with pytest.raises(SettingsError, match="split `retain`"):
        UnlearningTrainer(tiny_gpt2(), settings(tmp_path, max_retain_drop=0.1), FORGET, RETAIN)


@pytest.mark.parametrize("loss", ["next_best", "npo", "pgu"])
def test_no_forget_batch_changes_the_running_statistics_of_batch_norms(loss: str, tmp_path: Path) -> None:
    model, rows = kinds.drawn(kinds.resnet, 1.5)(), image_rows(12)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    args = UnlearningConfig(str(tmp_path), loss=loss, constraint="none", max_steps=2, use_cpu=True, disable_tqdm=True)
    trainer = UnlearningTrainer(model, args, rows[:6], holdout_dataset=rows[6:])
    trainer.train()
    assert len(before) > 3 and all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    model.train()
    model(**PaddingCollator()(rows[:6]))  # negative control: a forward pass in training mode does
    assert not all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
