"""The trained parameters of a constrained run: plain weights and LoRA adapters, whole or sharded.

Shapes: step_OI of one layer; r the rank of an adapter. All that a part keeps is its process's share of the values, see
`placements`.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_unlearn.constraints.base import BoundConstraint
from hf_unlearn.constraints.layouts import Whole, apply_right, placement_of, whole_parameter
from hf_unlearn.core.sharding import whole
from hf_unlearn.errors import ModelError, SettingsError
from hf_unlearn.models.adapters import base_name, layer_of, lora_layers
from hf_unlearn.models.layers import Layer, describe_layer, layers_of
from hf_unlearn.statistics.eigen import Eigen


@dataclass
class Part:
    """One trained parameter: where it lives, its constraint if it has one, and its values to come back to.

    `owner` is its layer's name in the base model, `factor` is "A" or "B" for those of an adapter. `anchor` has the
    original values and `before` those before the step, both local.
    """

    owner: str
    factor: str
    module: nn.Module
    attribute: str
    layer: Layer | None
    bound: BoundConstraint | None
    anchor: Tensor
    laid_out: type[Whole]
    before: Tensor | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """Read at each use: sharding replaces parameter objects."""
        return getattr(self.module, self.attribute)

    @property
    def place(self) -> Whole:
        """How the parameter lies on the processes now."""
        return placement_of(self.parameter)

    def follow(self) -> None:
        """Keep only this process's share of the anchor, once the parameter has been sharded."""
        place = self.place
        if type(place) is not self.laid_out:
            _check_place(self.owner, self.layer, place)
            own = place.read()
            self.anchor = place.local(self.anchor).to(own, copy=True)
            self.laid_out = type(place)

    def matrix(self, local: Tensor, place: Whole | None = None) -> Tensor:
        """Local values as `[O, I]` (of blocks `[G, O, I]`), of all processes together; `place` saves asking for it."""
        matrix = (place or self.place).matrix(local)
        return matrix if self.layer is None else self.layer.weight_OI(matrix)

    def local(self, matrix_OI: Tensor, place: Whole | None = None) -> Tensor:
        """The inverse of `matrix`."""
        return (place or self.place).local(matrix_OI if self.layer is None else self.layer.stored(matrix_OI))

    def constrain(self) -> None:
        """Bring the weight to where its constraint lets it be: the whole move of an anchored one, else the step."""
        assert self.bound is not None
        place, reference = self.place, self.anchor if self.bound.anchored else self.before
        assert reference is not None
        step_OI = self.matrix(_wide(place.read()) - _wide(reference), place)
        place.write(self.local(self.bound(step_OI), place).add_(reference))

    def constrain_gradient(self) -> None:
        """Project the gradient, if there is one."""
        assert self.bound is not None
        place = self.place
        gradient = place.gradient()
        if gradient is not None:
            place.set_gradient(self.local(self.bound(self.matrix(gradient, place)), place))

    @property
    def original_OI(self) -> Tensor:
        """The layer's original weight."""
        return self.matrix(self.anchor)

    def move_times_root(self, gram: Eigen) -> Tensor:
        """The move of the layer's weight so far times the root of a Gram: `[O, I]`, a DTensor where the weight is."""
        step_OI = self.matrix(self.place.read().float() - self.anchor.float())
        return apply_right(gram.times_root, step_OI)


@dataclass
class Adapter:
    """A LoRA layer with both its factors: the base weight moves by `scaling * B A`, B being 0 at first.

    The factors are small: what needs both is computed from whole ones, on every process.
    """

    owner: str
    base: nn.Module
    a: Part
    b: Part
    scaling: float
    base_norm: Tensor | None = None

    @property
    def original_OI(self) -> Tensor:
        """The base weight, of a quantised layer as it is used; gathered where it is sharded."""
        from peft.utils.integrations import dequantize_module_weight

        shape = describe_layer(self.base)
        assert shape is not None
        weight: Any = self.base.weight
        quantised = hasattr(weight, "quant_state") or hasattr(weight, "SCB")
        full = dequantize_module_weight(self.base).detach() if quantised else whole_parameter(weight)
        return shape.weight_OI(full)

    def move_times_root(self, gram: Eigen) -> Tensor:
        """The move of the merged weight so far, times the root of a Gram."""
        a_rI, b_Or = (_full(part, part.place.read()) for part in (self.a, self.b))
        return self.scaling * (b_Or @ gram.times_root(a_rI))

    def norm(self) -> Tensor:
        """Norm of the base weight; computed once."""
        if self.base_norm is None:
            self.base_norm = self.original_OI.float().norm()
        return self.base_norm

    def step_norm(self) -> Tensor:
        """Norm of the merged weight's last step to first order, `scaling |dB A + B dA|`, from `[2r, 2r]` products."""
        assert self.a.before is not None and self.b.before is not None
        a_rI, b_Or = _full(self.a, self.a.before), _full(self.b, self.b.before)
        step_a_rI = _full(self.a, self.a.place.read()) - a_rI
        step_b_Or = _full(self.b, self.b.place.read()) - b_Or
        left, right = torch.cat([step_b_Or, b_Or], 1), torch.cat([a_rI, step_a_rI])
        return self.scaling * ((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt()


def trained_parts(model: nn.Module, bound: dict[str, BoundConstraint]) -> list[Part]:
    """Every trainable parameter with its constraint; the values of the moment are the anchors."""
    return [_part(model, name, bound) for name, p in model.named_parameters() if p.requires_grad]


def trained_adapters(model: nn.Module, parts: list[Part]) -> list[Adapter]:
    """The LoRA layers among the trained parts; A is brought to where the constraint lets it be, which is its anchor.

    That changes nothing yet: B is 0.

    Raises:
        SettingsError: Only one factor of an adapter is trained.
        ModelError: An adapter of a layer that is no plain matrix.
    """
    by_factor = {(part.owner, part.factor): part for part in parts if part.factor}
    found = []
    for owner, module, adapter in lora_layers(model):
        a, b = by_factor.get((owner, "A")), by_factor.get((owner, "B"))
        if a is None and b is None:
            continue
        if a is None or b is None:
            raise SettingsError(f"of the adapter of {owner} only one factor is trained; train both or neither")
        if a.bound is not None and a.bound.right is not None:
            a.anchor = a.local(apply_right(a.bound.right.root(), a.matrix(a.anchor)))
            a.place.write(a.anchor)
        base = describe_layer(module)
        if base is None or not base.plain:
            raise ModelError(f"{owner} is no plain linear layer, its adapter is not handled: leave it out")
        found.append(Adapter(owner, module.get_base_layer(), a, b, module.scaling[adapter]))
    return found


def _part(model: nn.Module, name: str, bound: dict[str, BoundConstraint]) -> Part:
    prefix, _, attribute = name.rpartition(".")
    module = model.get_submodule(prefix)
    layer = layers_of(module).get(attribute)
    owner, factor = layer_of(name)
    if layer is not None and attribute != "weight":
        owner = base_name(name)
    both = bound.get(owner) if layer else None
    if both is not None and factor:
        right, left = (both.right, None) if factor == "A" else (None, both.left)
        both = BoundConstraint(right, left, both.anchored)
    place = placement_of(getattr(module, attribute))
    _check_place(owner, layer, place)
    return Part(owner, factor, module, attribute, layer, both, place.read().clone(), type(place))


def _check_place(owner: str, layer: Layer | None, place: Whole) -> None:
    """Raise `ModelError` where a weight that is no plain matrix is sharded."""
    if layer is not None and not layer.plain and type(place) is not Whole:
        raise ModelError(
            f"{owner} is no plain linear layer, and its weight is sharded (FSDP, DeepSpeed), which is not handled; "
            f"freeze it, or train on one process or with DDP"
        )


def _full(part: Part, local: Tensor) -> Tensor:
    return whole(part.matrix(local.float()))


def _wide(tensor: Tensor) -> Tensor:
    """16-bit values as float32: a step is smaller than what they can hold beside the weight."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
