"""The trained parameters of a constrained run: plain weights and LoRA adapters, replicated or sharded.

Shapes: step_OI of a layer with O outputs and I inputs; r the rank of an adapter. A trained weight keeps only its
process's local values, see `layouts`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_unlearn.constraints.base import BoundConstraint
from hf_unlearn.constraints.layouts import Layout, Replicated, apply_right, gathered_parameter, layout_of
from hf_unlearn.core.sharding import whole
from hf_unlearn.core.text import ShortRepr
from hf_unlearn.errors import ModelError, SettingsError
from hf_unlearn.models.adapters import base_name, layer_of, lora_layers
from hf_unlearn.models.layers import Layer, describe_layer, layers_of
from hf_unlearn.statistics.eigen import Eigen


class TrainedLayer(Protocol):
    """A layer that the run trains: what its original weight was, and how far the weight has moved."""

    owner: str
    """Name of the layer in the base model."""

    @property
    def original_OI(self) -> Tensor:
        """The original weight of the layer."""
        ...

    def move_times_root(self, gram: Eigen) -> Tensor:
        """Return the move of the layer's weight from the original, times the root of its Gram: `[O, I]`."""
        ...


@dataclass(repr=False)
class TrainedWeight(ShortRepr):
    """One trained parameter with its constraint and the values to return to.

    Attributes:
        owner: Name of its layer in the base model.
        factor: "A" or "B" for the factors of an adapter, else "".
        module, attribute: Where the parameter is: `getattr(module, attribute)`.
        layer: Geometry of the layer; None for a parameter that is not the weight of a layer.
        bound: The constraint on this parameter, if it has one.
        anchor: Local original values.
        anchor_layout: Type of layout that `anchor` is in.
        before: Local values before the current step; None between steps.
    """

    owner: str
    factor: str
    module: nn.Module
    attribute: str
    layer: Layer | None
    bound: BoundConstraint | None
    anchor: Tensor
    anchor_layout: type[Layout]
    before: Tensor | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter; looked up at each use because sharding replaces parameter objects."""
        return getattr(self.module, self.attribute)

    @property
    def layout(self) -> Layout:
        """The current layout of the parameter."""
        return layout_of(self.parameter)

    @property
    def anchored(self) -> bool:
        """Whether it has an anchored constraint, which holds for the total move from the original values."""
        return self.bound is not None and self.bound.anchored

    def shard_anchor(self) -> None:
        """Keep only this process's share of the anchor, once the parameter has been sharded."""
        layout = self.layout
        if type(layout) is not self.anchor_layout:
            _check_layout(self.owner, self.layer, layout)
            self.anchor = layout.local(self.anchor).to(layout.read(), copy=True)
            self.anchor_layout = type(layout)

    def matrix(self, local: Tensor, layout: Layout | None = None) -> Tensor:
        """Return local values as `[O, I]` (of G blocks `[G, O, I]`), complete or as a DTensor.

        Args:
            local: Local values of the parameter, its gradient or a step.
            layout: The current layout, if the caller has it already.
        """
        matrix = (layout or self.layout).matrix(local)
        return matrix if self.layer is None else self.layer.weight_OI(matrix)

    def local(self, matrix_OI: Tensor, layout: Layout | None = None) -> Tensor:
        """Return the local values of a matrix; the inverse of `matrix`."""
        return (layout or self.layout).local(matrix_OI if self.layer is None else self.layer.stored(matrix_OI))

    def constrain(self) -> None:
        """Constrain the last step; with an anchored constraint, the total move from the anchor."""
        assert self.bound is not None
        layout, reference = self.layout, self.anchor if self.bound.anchored else self.before
        assert reference is not None
        step_OI = self.matrix(_at_least_float32(layout.read()) - _at_least_float32(reference), layout)
        layout.write(self.local(self.bound(step_OI), layout).add_(reference))

    def constrain_gradient(self) -> None:
        """Constrain the gradient, if there is one."""
        assert self.bound is not None
        layout = self.layout
        gradient = layout.gradient()
        if gradient is not None:
            layout.set_gradient(self.local(self.bound(self.matrix(gradient, layout)), layout))

    @property
    def original_OI(self) -> Tensor:
        """The original weight of the layer."""
        return self.matrix(self.anchor)

    def move_times_root(self, gram: Eigen) -> Tensor:
        """Return the move from the anchor times the root of a Gram: `[O, I]`, a DTensor if the weight is one."""
        step_OI = self.matrix(self.layout.read().float() - self.anchor.float())
        return apply_right(gram.times_root, step_OI)


@dataclass(repr=False)
class TrainedAdapter(ShortRepr):
    """A LoRA layer with both factors trained: the base weight moves by `scaling * B A`, with B = 0 at the start.

    The factors are small, so what needs both is computed from the gathered factors on every process.

    Attributes:
        owner: Name of the layer in the base model.
        base: The layer that the adapter wraps.
        a, b: The two factors, `[r, I]` and `[O, r]`.
        scaling: LoRA's `alpha / r` (or `alpha / sqrt(r)`).
    """

    owner: str
    base: nn.Module
    a: TrainedWeight
    b: TrainedWeight
    scaling: float
    _base_norm: Tensor | None = None

    @property
    def original_OI(self) -> Tensor:
        """The base weight, gathered if it is sharded; of a quantised layer the dequantised weight."""
        from peft.utils.integrations import dequantize_module_weight

        shape = describe_layer(self.base)
        assert shape is not None
        weight: Any = self.base.weight
        quantised = hasattr(weight, "quant_state") or hasattr(weight, "SCB")
        full = dequantize_module_weight(self.base).detach() if quantised else gathered_parameter(weight)
        return shape.weight_OI(full)

    def move_times_root(self, gram: Eigen) -> Tensor:
        """Return the move of the merged weight from the original, times the root of a Gram: `[O, I]`."""
        a_rI, b_Or = (_gathered(factor, factor.layout.read()) for factor in (self.a, self.b))
        return self.scaling * (b_Or @ gram.times_root(a_rI))

    def norm(self) -> Tensor:
        """Return the norm of the base weight; computed once."""
        if self._base_norm is None:
            self._base_norm = self.original_OI.float().norm()
        return self._base_norm

    def step_norm(self) -> Tensor:
        """Return the first-order norm of the merged weight's last step, `scaling |dB A + B dA|`.

        It is computed from products of shape `[2r, 2r]`, without an `[O, I]` matrix.
        """
        assert self.a.before is not None and self.b.before is not None
        a_rI, b_Or = _gathered(self.a, self.a.before), _gathered(self.b, self.b.before)
        step_a_rI = _gathered(self.a, self.a.layout.read()) - a_rI
        step_b_Or = _gathered(self.b, self.b.layout.read()) - b_Or
        left, right = torch.cat([step_b_Or, b_Or], 1), torch.cat([a_rI, step_a_rI])
        return self.scaling * ((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt()


def trained_weights(model: nn.Module, bound: Mapping[str, BoundConstraint]) -> list[TrainedWeight]:
    """Return every trainable parameter with its constraint; the current values become the anchors."""
    return [_trained_weight(model, name, bound) for name, p in model.named_parameters() if p.requires_grad]


def trained_adapters(model: nn.Module, weights: Sequence[TrainedWeight]) -> list[TrainedAdapter]:
    """Return the LoRA layers among the trained weights, after constraining each A; the result is A's anchor.

    The model's outputs do not change, since B is 0.

    Raises:
        SettingsError: Only one factor of an adapter is trainable.
        ModelError: A layer with an adapter is not a plain matrix.
    """
    by_factor = {(weight.owner, weight.factor): weight for weight in weights if weight.factor}
    adapters = []
    for owner, module, adapter_name in lora_layers(model):
        a, b = by_factor.get((owner, "A")), by_factor.get((owner, "B"))
        if a is None and b is None:
            continue
        if a is None or b is None:
            raise SettingsError(f"only one LoRA factor of {owner} is trainable; train both or neither")
        if a.bound is not None and a.bound.right is not None:
            a.anchor = a.local(apply_right(a.bound.right.root(), a.matrix(a.anchor)))
            a.layout.write(a.anchor)
        base = describe_layer(module)
        if base is None or not base.plain:
            raise ModelError(f"{owner} is not a plain linear layer; its adapter is not supported, leave it out")
        adapters.append(TrainedAdapter(owner, module.get_base_layer(), a, b, module.scaling[adapter_name]))
    return adapters


def _trained_weight(model: nn.Module, name: str, bound: Mapping[str, BoundConstraint]) -> TrainedWeight:
    prefix, _, attribute = name.rpartition(".")
    module = model.get_submodule(prefix)
    layer = layers_of(module).get(attribute)
    owner, factor = layer_of(name)
    if layer is not None and attribute != "weight":
        owner = base_name(name)
    constraint = bound.get(owner) if layer else None
    if constraint is not None and factor:  # A has the layer's inputs, B its outputs
        right, left = (constraint.right, None) if factor == "A" else (None, constraint.left)
        constraint = BoundConstraint(right, left, constraint.anchored)
    layout = layout_of(getattr(module, attribute))
    _check_layout(owner, layer, layout)
    anchor = layout.read().clone()
    return TrainedWeight(owner, factor, module, attribute, layer, constraint, anchor, type(layout))


def _check_layout(owner: str, layer: Layer | None, layout: Layout) -> None:
    """Raise `ModelError` if a weight that is not a plain matrix is sharded."""
    if layer is not None and not layer.plain and not isinstance(layout, Replicated):
        raise ModelError(
            f"{owner} is not a plain linear layer and its weight is sharded (FSDP, DeepSpeed), which is not supported; "
            "freeze it, or train on one process or with DDP"
        )


def _gathered(weight: TrainedWeight, local: Tensor) -> Tensor:
    return whole(weight.matrix(local.float()))


def _at_least_float32(tensor: Tensor) -> Tensor:
    """Convert 16-bit values to float32: next to a weight they cannot resolve a small step."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
