"""Scopes that change a model and restore it: eval mode, gradient flags, weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Scope in which all of the model is in eval mode; each module gets its own mode back.

    `model.train(model.training)` would not do: it puts batch norms that are held in eval mode (PGU, WACV 2024, section
    3.4 freezes their statistics) into training mode with the rest.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def hold_norm_statistics(model: nn.Module) -> None:
    """Put batch norms in eval mode, so that forget batches do not enter their running statistics."""
    for module in model.modules():
        if getattr(module, "track_running_stats", False):
            module.eval()


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Put weights, buffers, `requires_grad`, gradients, modes and the random state back at the end, to the bit."""
    tensors = [*model.parameters(), *model.buffers()]
    values = [tensor.detach().to("cpu", copy=True) for tensor in tensors]
    flags = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    devices = [tensor.device for tensor in tensors[:1] if tensor.is_cuda]
    for parameter in model.parameters():
        parameter.grad = None  # what is accumulated meanwhile is not the owner's
    try:
        with torch.random.fork_rng(devices=devices), eval_mode(model):
            yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
        for parameter, required, grad in flags:
            parameter.grad = None
            parameter.requires_grad_(required)
            parameter.grad = grad


@contextmanager
def flags_kept(model: nn.Module) -> Iterator[None]:
    """Scope after which the parameters that could train before can again: the next run decides for itself."""
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            if name in trainable:
                parameter.requires_grad_(True)
