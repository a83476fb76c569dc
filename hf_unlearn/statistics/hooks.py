"""Hooks that read layer inputs and outputs during a forward pass."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn


@contextmanager
def record_inputs(
    layers: Mapping[str, nn.Module], receive: Callable[..., None], outputs: Callable | None = None
) -> Iterator[None]:
    """Call `receive(name, *arguments)` at each forward of each layer, and `outputs(name, output)` after it if given.

    A returned tensor of `outputs` replaces the layer's output. Hooks are removed on exit, also on errors.
    """
    handles = []
    try:
        for name, module in layers.items():
            handles.append(module.register_forward_pre_hook(lambda m, args, name=name: receive(name, *args)))
            if outputs is not None:
                handles.append(module.register_forward_hook(lambda m, args, out, name=name: outputs(name, out)))
        yield
    finally:
        for handle in handles:
            handle.remove()
