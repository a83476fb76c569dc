"""Loss scaling and compilation: steps that a scaler skips stay skipped, and compiled models keep the guarantee."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from helpers.tiny import collate, tiny_llama
from helpers.training import FORGET, RETAIN, logits, moved, settings, trained
from hf_unlearn.constraints.energy import EnergyConstraint
from hf_unlearn.constraints.step_constrainer import constrain_optimizer
from hf_unlearn.models.trainable import freeze_unprotected
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.trainer.trainer import UnlearningTrainer


@pytest.mark.parametrize("relative", [False, True], ids=["own step", "relative step"])
def test_a_step_that_a_scaler_skips_moves_nothing(relative: bool) -> None:
    model = tiny_llama()
    statistics = collect_statistics(model, RETAIN, progress=False)
    freeze_unprotected(model, statistics.layers)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    constrain_optimizer(optimizer, model, statistics, EnergyConstraint(1.0), relative_step=relative)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before, moves = logits(model, RETAIN), []
    for step in range(4):
        start = trained(model)
        scaler.scale(-model(**collate(FORGET)).loss).backward()
        if step % 2:
            parameters[0].grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        moves.append(any(not torch.equal(start[name], w) for name, w in trained(model).items()))
    assert moves == [True, False, True, False] and scaler.get_scale() == 2.0**8
    assert (logits(model, RETAIN) - before).abs().max() < 1e-5


class Overflow(TrainerCallback):
    """Gradients overflow before the second step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if state.global_step == 1:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(math.inf)


class Scaled(UnlearningTrainer):
    """The loss scaling of fp16 runs, which accelerate allows on accelerators only."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)


@pytest.mark.parametrize("constraint", ["energy", "kronecker"])
def test_a_trainer_with_a_scaler_skips_overflows_and_else_steps_as_without(constraint: str, tmp_path: Path) -> None:
    def end(kind: type[UnlearningTrainer], steps: int, *callbacks: TrainerCallback) -> tuple[dict[str, Any], Any]:
        model = tiny_llama()
        args = settings(tmp_path, constraint=constraint, max_steps=steps, max_grad_norm=0.0, learning_rate=1e-2)
        args.per_device_train_batch_size = len(FORGET)  # every step sees the same rows
        trainer = kind(model, args, FORGET, RETAIN, callbacks=list(callbacks))
        trainer.train()
        return trained(model), trainer

    plain, _ = end(UnlearningTrainer, 3)
    scaled, trainer = end(Scaled, 4, Overflow())
    assert trainer.accelerator.scaler.get_scale() == 2.0**9 and trainer.state.global_step == 4
    for name in plain:
        torch.testing.assert_close(scaled[name], plain[name], rtol=1e-5, atol=1e-6)
    longer, _ = end(UnlearningTrainer, 4)  # the control: a step more is a different model
    assert any((longer[name] - plain[name]).abs().max() > 1e-4 for name in plain)


def compiled(backend: str, tmp_path: Path) -> None:
    common = {"learning_rate": 1e-2, "loss": "npo", "optim": "adamw_torch", "max_steps": 4}  # npo: original model too
    plain, same = tiny_llama(), tiny_llama()
    moved(plain, settings(tmp_path / "plain", **common))
    args = settings(tmp_path / "compiled", torch_compile=True, torch_compile_backend=backend, **common)
    retain, forget, trainer = moved(same, args)
    assert retain < 1e-5 and forget > 1e-2
    assert type(trainer.model_wrapped).__name__ == "OptimizedModule"
    for name, weight in trained(plain).items():
        torch.testing.assert_close(trained(same)[name], weight, rtol=1e-4, atol=1e-5)
    trainer.save_model()
    again = type(same).from_pretrained(tmp_path / "compiled").eval()
    torch.testing.assert_close(logits(again, FORGET), logits(same, FORGET), rtol=1e-5, atol=1e-5)


def test_a_compiled_model_keeps_the_guarantee_and_the_weights(tmp_path: Path) -> None:
    compiled("eager", tmp_path)


@pytest.mark.slow
def test_so_does_one_of_inductor(tmp_path: Path) -> None:
    compiled("inductor", tmp_path)
