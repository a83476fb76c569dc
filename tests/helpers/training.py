"""Rows, settings and checks of the trainer tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from helpers.tiny import collate, text_rows
from hf_unlearn.trainer.config import UnlearningConfig
from hf_unlearn.trainer.trainer import UnlearningTrainer

Row = dict[str, Any]
# Seven positions in all: fewer than the width, so that energy 1.0 leaves room to move in.
RETAIN = text_rows(2, seed=1, lengths=(4, 3), prompt=1)
FORGET = text_rows(4, seed=2)
HOLDOUT = text_rows(4, seed=3)


def settings(folder: Path, **changes: Any) -> UnlearningConfig:
    """Six quick steps on the CPU."""
    few = {"use_cpu": True, "disable_tqdm": True, "max_steps": 6, "per_device_train_batch_size": 2, "seed": 0}
    few["constraint"] = "energy"
    exact = {"constraint_settings": {"energy": 1.0}} if changes.get("constraint", "energy") == "energy" else {}
    return UnlearningConfig(str(folder), **{**few, **exact, **changes})


@torch.no_grad()
def logits(model: nn.Module, rows: list[Row]) -> Tensor:
    """Logits of every unpadded position, in eval mode."""
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    batch = {name: tensor.to(device) for name, tensor in collate(rows).items()}
    found = model(**{k: v for k, v in batch.items() if k != "labels"}).logits[batch["attention_mask"] == 1]
    model.train(training)
    return found.float().cpu()


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def moved(model: nn.Module, args: UnlearningConfig, **options: Any) -> tuple[float, float, UnlearningTrainer]:
    """Largest change of a retain logit and of a forget logit over a run; the trainer."""
    before = logits(model, RETAIN), logits(model, FORGET)
    trainer = UnlearningTrainer(model, args, FORGET, RETAIN, **options)
    trainer.train()
    after = logits(model, RETAIN), logits(model, FORGET)
    retain, forget = ((a - b).abs().max().item() for a, b in zip(after, before, strict=True))
    return retain, forget, trainer
