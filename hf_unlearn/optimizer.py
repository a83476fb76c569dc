"""Constraining any torch optimizer through its step hooks; the anchor; the drift meter.

Shapes: weight_OI, step_OI of one layer; gram_II and fisher_OO of the statistics.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_unlearn.adapters import check_adapters, layer_of, lora_layers
from hf_unlearn.constraints import BoundConstraint, ConstraintLike, bind_constraints
from hf_unlearn.coverage import check_covered
from hf_unlearn.errors import SettingsError
from hf_unlearn.layers import Layer, describe_layer
from hf_unlearn.statistics import RetainStatistics


def constrain_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    statistics: RetainStatistics,
    constraint: ConstraintLike,
    *,
    allow_exposed: Iterable[str] = (),
    relative_step: bool = False,
) -> torch.optim.Optimizer:
    """Make every `optimizer.step()` obey `constraint`; works with any torch optimizer and any training loop.

    Call it on the original weights: they become the anchor. The optimizer is returned, with a `StepConstrainer` as
    its attribute `constrainer` (drift meter, original weights).

    Args:
        optimizer: Any torch optimizer, or accelerate's wrapper of one.
        model: The model whose weights it trains.
        statistics: Statistics of these weights.
        constraint: One constraint, None, or a mapping from layer name patterns to either.
        allow_exposed: Shell patterns of parameters that may train without protection.
        relative_step: Rescale each step to the norm `lr * |weights|`, over all trained weights together; the learning
            rate then is the relative size of a step, whatever the loss's scale.

    Raises:
        StatisticsError: The statistics belong to another model, or lack a Fisher that the constraint needs.
        CoverageError: The optimizer trains a parameter that has no statistics and is not in `allow_exposed`.
    """
    inner: Any = getattr(optimizer, "optimizer", optimizer)
    statistics.check_model(model)
    trained = [p for group in inner.param_groups for p in group["params"]]
    if constraint is not None:
        check_covered(model, trained, statistics.layers, allow_exposed)
    constrainer = StepConstrainer(model, statistics, constraint, relative_step=relative_step)
    constrainer.attach(inner)
    inner.constrainer = constrainer
    return optimizer


@dataclass
class _Part:
    """One trained parameter: where it lives, its constraint if it has one, and its values to come back to.

    `owner` is its layer's name in the base model, `factor` is "A" or "B" for those of an adapter.
    """

    owner: str
    factor: str
    module: nn.Module
    attribute: str
    layer: Layer | None
    bound: BoundConstraint | None
    anchor: Tensor
    before: Tensor | None = None
    anchor_output: Tensor | None = None
    """`|W_0 X^T|`, the root mean square of the layer's original outputs; computed once, by `drift`."""

    @property
    def parameter(self) -> nn.Parameter:
        """Read at each use: sharding replaces parameter objects."""
        return getattr(self.module, self.attribute)

    def matrix(self, tensor: Tensor) -> Tensor:
        """View as `[O, I]` where the parameter belongs to a known layer."""
        return self.layer.weight_OI(tensor) if self.layer is not None else tensor

    @property
    def original_OI(self) -> Tensor:
        """The layer's original weight."""
        return self.matrix(self.anchor)

    def move_times(self, root_II: Tensor) -> Tensor:
        """The move of the layer's weight so far, times a matrix."""
        return (self.matrix(self.parameter.detach()).float() - self.original_OI.float()) @ root_II


@dataclass
class _Adapter:
    """A LoRA layer with both its factors: the base weight moves by `scaling * B A`, B being 0 at first."""

    owner: str
    base: nn.Module
    a: _Part
    b: _Part
    scaling: float
    anchor_output: Tensor | None = None
    base_norm: Tensor | None = None

    @property
    def original_OI(self) -> Tensor:
        """The base weight, of a quantised layer as it is used."""
        from peft.utils.integrations import dequantize_module_weight

        shape = describe_layer(self.base)
        assert shape is not None
        return shape.weight_OI(dequantize_module_weight(self.base).detach())

    def move_times(self, root_II: Tensor) -> Tensor:
        """The move of the merged weight so far, times a matrix."""
        a_rI, b_Or = (part.parameter.detach().float() for part in (self.a, self.b))
        return self.scaling * (b_Or @ (a_rI @ root_II))

    def norm(self) -> Tensor:
        if self.base_norm is None:
            self.base_norm = self.original_OI.float().norm()
        return self.base_norm

    def step_norm(self) -> Tensor:
        """Norm of the merged weight's last step to first order, `scaling |dB A + B dA|`, from `[2r, 2r]` products."""
        assert self.a.before is not None and self.b.before is not None
        a_rI, b_Or = self.a.before.float(), self.b.before.float()
        step_a_rI = self.a.parameter.detach().float() - a_rI
        step_b_Or = self.b.parameter.detach().float() - b_Or
        left, right = torch.cat([step_b_Or, b_Or], 1), torch.cat([a_rI, step_a_rI])
        return self.scaling * ((left.T @ left) * (right @ right.T)).sum().clamp(min=0).sqrt()


@dataclass(frozen=True)
class Drift:
    """Predicted effect of the whole move from the original weights on the retain data, from the statistics alone.

    Attributes:
        by_layer: Relative change of each layer's outputs: `sqrt(tr(D gram D^T) / tr(W_0 gram W_0^T))`.
        kl: `1/2 sum tr(fisher D gram D^T)`, in nats per label; None without a Fisher.
    """

    by_layer: dict[str, float]
    kl: float | None

    @property
    def relative(self) -> float:
        """Root mean square over layers of the relative output change."""
        squares = [value**2 for value in self.by_layer.values()]
        return (sum(squares) / len(squares)) ** 0.5 if squares else 0.0


class StepConstrainer:
    """Holds the constraint of each trained weight and enforces it around `optimizer.step()`.

    Anchored constraints (energy) restore `W = W_0 + (W - W_0)(I - U U^T)` after each step, so that neither momentum,
    preconditioning, weight decay nor rounding accumulates. The others (ridge, Kronecker) are applied once to the
    realised step; for SGD with or without momentum that equals applying them to the gradient.

    LoRA (base weight + `scaling * B A`): A gets the right factor R, B the left factor L. With an energy constraint A
    stays in the residual space, so that the merged move is orthogonal to the core space exactly. With the others A
    starts as `A_0 R^(1/2)` and the steps of A and B are multiplied by R and L, which is the steps of `A = A' R^(1/2)`,
    `B = L^(1/2) B'` in A' and B': the merged move always is `L^(1/2) X R^(1/2)` with X of rank r (exact), and a small
    step of it is the one that the same optimizer would make without constraint, with L and R on the part through B
    and on that through A (approximate: a full-weight step has both on the whole).
    """

    def __init__(
        self,
        model: nn.Module,
        statistics: RetainStatistics | None,
        constraint: ConstraintLike,
        *,
        relative_step: bool = False,
    ):
        if statistics is None and constraint is not None:
            raise SettingsError("a constraint needs statistics; collect them, or choose constraint none")
        self.statistics, self.relative_step = statistics, relative_step
        self.measure_leak = False
        self.leak: float | None = None
        device = next(model.parameters()).device
        bound = bind_constraints(statistics, constraint, device) if statistics is not None else {}
        check_adapters(model)
        self.parts = [_part(model, name, bound) for name, p in model.named_parameters() if p.requires_grad]
        self.adapters = _adapters(model, self.parts)
        self._gradients_constrained = False

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Register the step hooks on a torch optimizer."""
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)

    @torch.no_grad()
    def constrain_gradients(self) -> None:
        """Project the gradients of anchored constraints: before clipping and before the optimizer's moments.

        What the step would remove anyway must not eat the clipping budget or fill the moments. Called by the step hook
        if nobody called it before.
        """
        for part in self.parts:
            gradient = part.parameter.grad
            if gradient is not None and part.bound is not None and part.bound.anchored:
                gradient_OI = part.matrix(gradient)
                gradient_OI.copy_(part.bound(gradient_OI))
        self._gradients_constrained = True

    @torch.no_grad()
    def drift(self) -> Drift:
        """Predicted retain drift of the move so far; empty without statistics."""
        by_layer, kl = {}, 0.0
        for moved in [part for part in self.parts if part.layer is not None and not part.factor] + self.adapters:
            name = moved.owner
            if self.statistics is None or name not in self.statistics.layers:
                continue
            original_OI = moved.original_OI
            root_II = self.statistics.gram_eigen(name).root_II.to(original_OI.device)
            if moved.anchor_output is None:
                moved.anchor_output = (original_OI.float() @ root_II).norm().clamp(min=1e-30)
            seen_OI = moved.move_times(root_II)
            by_layer[name] = (seen_OI.norm() / moved.anchor_output).item()
            if self.statistics.fisher_sums:
                root_OO = self.statistics.fisher_eigen(name).root_II.to(original_OI.device)
                share = (root_OO.T @ seen_OI).square().sum().item()
                kl += 0.5 * self.statistics.positions_per_label(name) * share
        return Drift(by_layer, kl if self.statistics is not None and self.statistics.fisher_sums else None)

    @contextmanager
    def original(self) -> Iterator[None]:
        """Put the original weights into the model for a while: the original model without a second copy of it."""
        current = [part.parameter.data for part in self.parts]
        try:
            self._swap([part.anchor for part in self.parts])
            yield
        finally:
            self._swap(current)

    def _swap(self, values: list[Tensor]) -> None:
        for part, value in zip(self.parts, values, strict=True):
            part.parameter.data = value
        torch.clear_autocast_cache()  # autocast would go on with its low-precision copies of the other weights

    def weights(self) -> list[Tensor]:
        """Copies of the trained weights, for `restore`."""
        return [part.parameter.detach().clone() for part in self.parts]

    @torch.no_grad()
    def restore(self, weights: list[Tensor] | None = None) -> None:
        """Write back weights from `weights()`; the original ones by default."""
        for part, saved in zip(self.parts, weights or [p.anchor for p in self.parts], strict=True):
            part.parameter.copy_(saved)

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        if not self._gradients_constrained:
            self.constrain_gradients()
        self._gradients_constrained = False
        if self.relative_step:
            self._normalise_gradients()
        for part in self.parts:
            if self.relative_step or self.measure_leak or (part.bound is not None and not part.bound.anchored):
                part.before = part.parameter.detach().clone()

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        for part in self.parts:
            if part.bound is None:
                continue
            weight_OI = part.matrix(part.parameter.detach())
            reference = part.anchor if part.bound.anchored else part.before
            assert reference is not None
            reference_OI = part.matrix(reference)
            weight_OI.copy_(reference_OI + part.bound(weight_OI - reference_OI))
        if self.relative_step:
            self._rescale_step(optimizer.param_groups[0]["lr"])
        if self.measure_leak:
            self.leak = self._leak()
        for part in self.parts:
            part.before = None

    def _normalise_gradients(self) -> None:
        """Bring the gradients to the norm of the trained weights, so that `lr` times them is not lost in rounding."""
        gradients = [p.parameter.grad for p in self.parts if p.parameter.grad is not None]
        if not gradients:
            return
        weight = torch.nn.utils.get_total_norm([part.parameter.detach() for part in self.parts])
        size = torch.nn.utils.get_total_norm(gradients)
        torch._foreach_mul_(gradients, weight / size.clamp(min=torch.finfo(size.dtype).tiny))

    def _rescale_step(self, relative: float) -> None:
        """Give the realised step the norm `relative * |weights|`; of an adapter the merged step and weight count."""
        moves = [(part.parameter.detach(), part.before) for part in self.parts if part.before is not None]
        plain = [(p.parameter.detach(), p.before) for p in self.parts if p.before is not None and not p.factor]
        steps = [(weight - before).norm() for weight, before in plain] + [a.step_norm() for a in self.adapters]
        sizes = [before.norm() for _, before in plain] + [adapter.norm() for adapter in self.adapters]
        size = torch.stack(steps).norm()
        if size > 0:
            scale = relative * torch.stack(sizes).norm() / size
            for weight, before in moves:
                weight.lerp_(before, (1 - scale).to(weight.dtype))

    def _leak(self) -> float | None:
        """`|D U| / |D|` of the last realised step, over all weights with an anchored constraint."""
        removed, total = 0.0, 0.0
        for part in self.parts:
            if part.bound is not None and part.bound.anchored and part.before is not None:
                step = part.parameter.detach().float() - part.before.float()
                inside, size = part.bound.leak(part.matrix(step))
                removed, total = removed + inside.item(), total + size.item()
        return (removed / total) ** 0.5 if total else None


def _part(model: nn.Module, name: str, bound: dict[str, BoundConstraint]) -> _Part:
    prefix, _, attribute = name.rpartition(".")
    module = model.get_submodule(prefix)
    layer = describe_layer(module) if attribute == "weight" else None
    anchor = getattr(module, attribute).detach().clone()
    owner, factor = layer_of(name)
    whole = bound.get(owner) if layer else None
    if whole is not None and factor:
        right, left = (whole.right, None) if factor == "A" else (None, whole.left)
        whole = BoundConstraint(right, left, whole.anchored)
    return _Part(owner, factor, module, attribute, layer, whole, anchor)


def _adapters(model: nn.Module, parts: list[_Part]) -> list[_Adapter]:
    """The LoRA layers among the trained parts; A is brought to where the constraint lets it be, which is its anchor.

    That changes nothing yet: B is 0.
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
            a.anchor = a.bound.right.root()(a.anchor)
            a.parameter.data.copy_(a.anchor)
        found.append(_Adapter(owner, module.get_base_layer(), a, b, module.scaling[adapter]))
    return found
