"""An MLP with statistics of its retain rows, and torch's optimizers, for the tests of constrained steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from helpers import dense_twin as reference
from helpers import tiny as cases
from hf_unlearn.constraints.step_constrainer import StepConstrainer, constrain_optimizer
from hf_unlearn.models.layers import find_layers
from hf_unlearn.models.trainable import freeze_unprotected
from hf_unlearn.statistics.collect import collect_statistics

Optimizer = torch.optim.Optimizer
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05, weight_decay=0.1),
}
if not hasattr(torch.optim, "Adafactor"):
    del OPTIMIZERS["adafactor"]
LAYERS = ("first", "second")


class Setting:
    """An MLP, 3 retain rows, 4 forget rows, and statistics of the retain rows on the original weights."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.model = cases.tiny_mlp(inputs=6, width=8).to(dtype)
        rows = [r | {"pixel_values": r["pixel_values"].to(dtype)} for r in cases.vector_rows(7)]
        self.retain, self.forget = rows[:3], cases.collate(rows[3:])
        self.statistics = collect_statistics(self.model, self.retain, fisher=True, progress=False)
        self.original = {name: self.weight(name) for name in LAYERS}
        self.rows_NI = {name: reference.input_rows(self.model, self.retain, name) for name in LAYERS}
        freeze_unprotected(self.model, find_layers(self.model))
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]

    def weight(self, name: str) -> np.ndarray:
        return self.model.get_submodule(name).weight.detach().double().numpy().copy()

    def moves(self) -> dict[str, np.ndarray]:
        return {name: self.weight(name) - self.original[name] for name in LAYERS}

    def gradients(self, sign: float = -1) -> list[np.ndarray]:
        """Gradients of ascent on the forget rows, left in `.grad`."""
        self.model.zero_grad()
        logits = self.model(self.forget["pixel_values"])
        (sign * nn.functional.cross_entropy(logits.float(), self.forget["labels"])).backward()
        return [p.grad.detach().double().numpy().copy() for p in self.parameters]

    def train(self, optimizer: Optimizer, steps: int) -> None:
        for _ in range(steps):
            self.gradients()
            optimizer.step()

    def logits(self, rows: Sequence[cases.Row]) -> Tensor:
        with torch.no_grad():
            return self.model(cases.collate(rows)["pixel_values"])


def inside(move_OI: np.ndarray, rows_NI: np.ndarray) -> float:
    """Share `|D U| / |D|` of a move that lies in the span of the rows, by the SVD of the rows."""
    outside_OI = move_OI @ reference.energy_projector(rows_NI, 1.0)
    return float(np.linalg.norm(move_OI - outside_OI) / np.linalg.norm(move_OI))


def moved(constraint: Any = None, dtype: torch.dtype = torch.float32) -> tuple[Setting, StepConstrainer]:
    setting = Setting(dtype)
    optimizer = OPTIMIZERS["momentum"](setting.parameters)
    constrain_optimizer(optimizer, setting.model, setting.statistics, constraint)
    setting.train(optimizer, 5)
    return setting, optimizer.constrainer  # type: ignore[attr-defined]
