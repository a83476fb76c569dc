"""Batches and models for the tests of losses."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from helpers import reference_losses as reference
from helpers.tiny import CASES, collate, sharpen
from hf_unlearn.models.forward import Predictions, output_logits, predict
from hf_unlearn.models.tasks import shifts_labels, task_of

Batch = dict[str, Any]
Scope = Callable[[], AbstractContextManager]


def before(model: nn.Module, original: nn.Module) -> Scope:
    """A scope in which `model` computes what `original` does."""

    @contextmanager
    def scope() -> Iterator[None]:
        current = [p.data for p in model.parameters()]
        try:
            for mine, its in zip(model.parameters(), original.parameters(), strict=True):
                mine.data = its.data
            yield
        finally:
            for mine, data in zip(model.parameters(), current, strict=True):
                mine.data = data

    return scope


def moved(model: nn.Module, scale: float = 0.5, seed: int = 5) -> nn.Module:
    """A copy with noise on every weight: the model some steps later."""
    torch.manual_seed(seed)
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn_like(parameter) * parameter.std().nan_to_num())
    return model


def dense(model: nn.Module, inputs: Batch, skip_first: bool = False) -> reference.Labels:
    with torch.no_grad():
        logits = output_logits(model, inputs).numpy()
    skip_first &= task_of(model) != "token-classification"  # its labels are not the tokens of an answer
    return reference.labelled(logits, inputs["labels"].numpy(), shifted=shifts_labels(model), skip_first=skip_first)


def gradients(loss: Tensor, model: nn.Module) -> Tensor:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in found if g is not None])


def made_up(n: int = 6, classes: int = 7, rows: int = 3, scale: float = 2.0, seed: int = 0) -> Predictions:
    """Predictions without a model, as leaves of the graph."""
    generator = torch.Generator().manual_seed(seed)
    logits_LV = (scale * torch.randn(n, classes, generator=generator)).requires_grad_()
    labels_L = torch.randint(classes, (n,), generator=generator)
    return Predictions(logits_LV, labels_L, torch.arange(n) * rows // n, rows)


# Directions


def memorised(model: nn.Module, inputs: Batch) -> Batch:
    """The same inputs with the labels that the model itself finds most probable: something there is to forget."""
    with torch.no_grad():
        best = output_logits(model, inputs).argmax(-1)
    labels = inputs["labels"]
    if labels.ndim == 2 and shifts_labels(model):
        best = torch.cat([best[:, :1], best[:, :-1]], 1)
    return {**inputs, "labels": torch.where(labels == -100, labels, best)}


def forget_likelihood(model: nn.Module, batch: Batch) -> float:
    with torch.no_grad():
        return -predict(model, batch["forget"]).nll_L.double().mean().item()


def step(model: nn.Module, loss: Tensor, size: float) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    norm = torch.stack([g.norm() for g in found if g is not None]).norm()
    with torch.no_grad():
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                parameter.sub_(size / norm * gradient)


# Settings without a default, or with one that leaves next to nothing to compare on models that hardly know the rows.
NEEDED: dict[str, dict[str, Any]] = {
    "pdu": {"eps": 0.5},
    "pgu_poison": {"offset": 0.0},
    "rmu": {"layer": 1},
    "undial": {"beta": 0.5},
    "simnpo": {"beta": 1.0},
    "satimp": {"beta1": 1.0},
}


def setup(case: str, *, retain: bool = True) -> tuple[nn.Module, nn.Module, Batch]:
    """(model, original, batch) of a case; forget rows are of unequal length where they have one."""
    make, rows = CASES[case]
    original = sharpen(make(), 1.5)
    batch = {"forget": collate(rows(4, seed=1))} | ({"retain": collate(rows(3, seed=2))} if retain else {})
    return moved(original), original, batch
