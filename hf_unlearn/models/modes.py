"""Temporary changes to a model, each undone at the end of its scope, also on exceptions.

- `eval_mode` puts every module in eval mode and restores each module's own mode.
- `restored` also restores weights, buffers, gradients, `requires_grad` and the random state; anything may change.
- `trainable_flags_restored` restores `requires_grad` of the parameters that were trainable: a run may freeze them.

`hold_norm_statistics` is not a scope: `Trainer.training_step` puts the model into training mode at each step, which
ends it, and a backward pass that computes activations again (gradient checkpointing) must still see it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module of `model` in eval mode; each module gets its own mode back.

    `model.train(model.training)` is not enough: it puts batch norms held in eval mode (PGU, WACV 2024, section 3.4
    freezes their statistics) into training mode with the other modules.

    >>> model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2)).train()
    >>> hold_norm_statistics(model)
    >>> with eval_mode(model):
    ...     [module.training for module in model]
    [False, False]
    >>> [module.training for module in model]
    [True, False]
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Restore weights, buffers, `requires_grad`, gradients, modes and the random state bit for bit at the end.

    The model is in eval mode and without gradients when the scope starts.

    >>> model = nn.Linear(2, 2)
    >>> before = model.weight.clone()
    >>> with restored(model), torch.no_grad():
    ...     _ = model.weight.add_(1)
    >>> torch.equal(model.weight, before)
    True
    """
    tensors = [*model.parameters(), *model.buffers()]
    values = [tensor.detach().to("cpu", copy=True) for tensor in tensors]
    flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    devices = [tensor.device for tensor in tensors[:1] if tensor.is_cuda]
    for parameter in model.parameters():
        parameter.grad = None  # gradients of the scope must not add to the caller's
    try:
        with torch.random.fork_rng(devices=devices), eval_mode(model):
            yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)
        for parameter, requires_grad, grad in flags:
            parameter.grad = None
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad


@contextmanager
def trainable_flags_restored(model: nn.Module) -> Iterator[None]:
    """Make parameters that are trainable now trainable again at the end, so that the next run chooses for itself.

    Parameters are matched by name.

    >>> model = nn.Linear(2, 2)
    >>> with trainable_flags_restored(model):
    ...     _ = model.bias.requires_grad_(False)
    >>> model.bias.requires_grad
    True
    """
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    try:
        yield
    finally:
        for name, parameter in model.named_parameters():
            if name in trainable:
                parameter.requires_grad_(True)


def hold_norm_statistics(model: nn.Module) -> None:
    """Put batch norms in eval mode until the next `model.train()`; forget batches do not change their statistics."""
    for module in model.modules():
        if getattr(module, "track_running_stats", False):
            module.eval()
