"""Hooks that read layer inputs and outputs during a forward pass, and which layers read the same input."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from hf_unlearn.errors import ModelError


@contextmanager
def record_inputs(
    layers: Mapping[str, nn.Module],
    receive: Callable[..., object],
    outputs: Callable[[str, Tensor], Tensor] | None = None,
) -> Iterator[None]:
    """Call `receive(name, *arguments)` at each forward pass of each layer, and `outputs(name, output)` after it.

    The tensor that `outputs` returns replaces the layer's output. Hooks are removed on exit, also after an error.
    """
    handles = []
    try:
        for name, module in layers.items():

            def before(module: nn.Module, args: tuple[object, ...], name: str = name) -> None:
                receive(name, *args)

            handles.append(module.register_forward_pre_hook(before))
            if outputs is not None:
                handles.append(module.register_forward_hook(lambda m, args, out, name=name: outputs(name, out)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def without_weight_gradients(model: nn.Module) -> Iterator[None]:
    """Turn off `requires_grad` of the parameters within a `with` block, since only activations need gradients."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    gradients = [p.grad for p in trainable]
    try:
        for parameter in trainable:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, gradient in zip(trainable, gradients, strict=True):
            parameter.requires_grad_(True)
            parameter.grad = gradient  # weights that FSDP has sharded get a gradient all the same


class SharedInputs:
    """Finds the layers that read the same tensor one after the other (q, k, v; gate, up); they share one Gram.

    Attributes:
        gram_of: Layer -> name of its Gram: the first of the layers that share the tensor. It is decided on the first
            batch and expected to hold on the others.
    """

    def __init__(self) -> None:
        self.gram_of: dict[str, str] = {}
        self._previous: tuple[weakref.ref[Tensor], int, str] | None = None

    def start_batch(self) -> None:
        """Forget the last tensor of the previous batch."""
        self._previous = None

    def add_unshared(self, name: str) -> None:
        """Note a layer with a Gram of its own, even if another layer read the same tensor."""
        self.gram_of.setdefault(name, name)
        self._previous = None

    def is_shared(self, name: str, tensor: Tensor) -> bool:
        """Return whether the layer that ran before `name` read this very tensor, unchanged since.

        Raises:
            ModelError: Layers shared their input in the first batch and do not now.
        """
        if self._previous is not None:
            previous, version, owner = self._previous
            same = previous() is tensor and version == tensor._version
        else:
            same, owner = False, name
        owner = self.gram_of.setdefault(name, owner if same else name)
        if owner != name and not same:
            raise ModelError(
                f"{name} shared its input with {owner} in one batch and not in another; name only {name} in `layers`"
            )
        self._previous = (weakref.ref(tensor), tensor._version, owner)
        return owner != name
