"""Constraining any torch optimizer through its step hooks; the anchor; the drift meter.

Shapes: weight_OI, step_OI of one layer; gram_II and fisher_OO of the statistics.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_unlearn.constraints.base import ConstraintLike
from hf_unlearn.constraints.binding import bind_constraints
from hf_unlearn.constraints.drift import Drift
from hf_unlearn.constraints.layouts import (
    Whole,
    apply_right,
    group_of,
    local_squares,
    settle,
    show_written,
    sum_over_shards,
    turned,
)
from hf_unlearn.constraints.trained_weights import Adapter, Part, trained_adapters, trained_parts
from hf_unlearn.errors import SettingsError
from hf_unlearn.models.adapters import check_adapters
from hf_unlearn.models.trainable import check_covered
from hf_unlearn.statistics.eigen import Eigen
from hf_unlearn.statistics.retain_statistics import RetainStatistics


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

    Attributes:
        still: Set, the next optimizer step changes the optimizer's state alone.
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
        self.still = False
        self.leak: float | None = None
        device = next(model.parameters()).device
        bound = bind_constraints(statistics, constraint, device) if statistics is not None else {}
        check_adapters(model)
        self.model = model
        self.parts = trained_parts(model, bound)
        self.adapters = trained_adapters(model, self.parts)
        self._gradients_constrained = False
        self._zero_optimizer: Any = None
        self._original_outputs: dict[str, float] = {}

    def attach(self, optimizer: Any) -> None:
        """Register the step hooks on a torch optimizer, or around the steps of a DeepSpeed engine.

        The engine's optimizer steps on flat pieces of several weights, which no hook of its own could tell apart.
        """
        if isinstance(optimizer, torch.optim.Optimizer):
            optimizer.register_step_pre_hook(self._before_step)
            optimizer.register_step_post_hook(self._after_step)
            return
        step, self._zero_optimizer = optimizer.step, optimizer.optimizer
        if self.relative_step:
            optimizer.optimizer.clip_grad = 0.0  # it would clip gradients that were brought to the weights' norm

        def constrained_step(*args: Any, **kwargs: Any) -> Any:
            self._before_step(optimizer.optimizer)
            result = step(*args, **kwargs)
            self._after_step(optimizer.optimizer)
            return result

        optimizer.step = constrained_step

    @torch.no_grad()
    def constrain_gradients(self) -> None:
        """Project the gradients of anchored constraints: before clipping and before the optimizer's moments.

        What the step would remove anyway must not eat the clipping budget or fill the moments. Called by the step hook
        if nobody called it before, unless the constrained move is the same without.
        """
        for part in self.parts:
            if part.bound is not None and part.bound.anchored:
                part.constrain_gradient()
        self._gradients_constrained = True

    @torch.no_grad()
    def drift(self) -> Drift:
        """Predicted retain drift of the move so far; empty without statistics."""
        self._settle()
        statistics, fisher = self.statistics, self.statistics is not None and bool(self.statistics.fisher_sums)
        moved = self._covered()
        if statistics is None or not moved:
            return Drift({}, 0.0 if fisher else None)
        seen: list[Tensor] = []
        divergence: list[Tensor] = []
        groups: list[Any] = []
        for one in moved:
            seen_OI = one.move_times_root(self._here(statistics.gram_eigen(one.owner)))
            seen.append(local_squares([seen_OI])[0])
            groups.append(group_of(seen_OI))
            if fisher:
                fisher_parts = self._here(statistics.fisher_eigen(one.owner))
                share = local_squares([apply_right(fisher_parts.times_root, turned(seen_OI))])[0]
                divergence.append(0.5 * statistics.positions_per_label(one.owner) * share)
        sums = sum_over_shards(torch.stack(seen + divergence), groups * (2 if fisher else 1)).tolist()
        outputs = self._outputs(moved)
        by_layer = {one.owner: square**0.5 / outputs[one.owner] for one, square in zip(moved, sums, strict=False)}
        return Drift(by_layer, sum(sums[len(moved) :]) if fisher else None)

    def _covered(self) -> list[Part | Adapter]:
        """The trained layers and adapters that there are statistics of."""
        layers = self.statistics.layers if self.statistics is not None else {}
        parts = [part for part in self.parts if part.layer is not None and not part.factor]
        moved: list[Part | Adapter] = [*parts, *self.adapters]
        return [one for one in moved if one.owner in layers]

    def _outputs(self, moved: list[Part | Adapter]) -> dict[str, float]:
        """`|W_0 X^T|`, the root mean square of each layer's original outputs; computed once."""
        if not self._original_outputs:
            assert self.statistics is not None
            squares, groups = [], []
            for one in moved:
                gram = self._here(self.statistics.gram_eigen(one.owner))
                output_OI = apply_right(gram.times_root, one.original_OI)
                squares.append(local_squares([output_OI])[0])
                groups.append(group_of(output_OI))
            sums = sum_over_shards(torch.stack(squares), groups).tolist()
            self._original_outputs = {
                one.owner: max(square**0.5, 1e-30) for one, square in zip(moved, sums, strict=True)
            }
        return self._original_outputs

    def _here(self, parts: Eigen) -> Eigen:
        return parts.to(self.parts[0].place.read().device)

    @contextmanager
    def original(self) -> Iterator[None]:
        """Put the original weights into the model for a while: the original model without a second copy of it."""
        current = self._exchange([part.anchor for part in self._settle()])
        try:
            yield
        finally:
            self._settle()
            self._exchange(current)

    def _exchange(self, values: list[Tensor]) -> list[Tensor]:
        before = [part.place.exchange(value) for part, value in zip(self.parts, values, strict=True)]
        self._show_written()
        torch.clear_autocast_cache()  # autocast would go on with its low-precision copies of the other weights
        return before

    def weights(self) -> list[Tensor]:
        """Copies of the trained weights (of this process's share of them), for `restore`."""
        return [part.place.read().clone() for part in self._settle()]

    @torch.no_grad()
    def restore(self, weights: list[Tensor] | None = None) -> None:
        """Write back weights from `weights()`; the original ones by default."""
        parts = self._settle()
        for part, saved in zip(parts, weights or [p.anchor for p in parts], strict=True):
            part.place.write(saved)
        self._show_written()

    def _show_written(self) -> None:
        if self._zero_optimizer is not None:
            show_written(self._zero_optimizer)

    def _settle(self) -> list[Part]:
        """The parts, once nothing gathered stands in for their shards and their anchors are sharded like them."""
        settle(self.model)
        for part in self.parts:
            part.follow()
        return self.parts

    @torch.no_grad()
    def _before_step(self, optimizer: Any, *hook: Any) -> None:
        self._settle()
        if not self._gradients_constrained and not self._is_linear(optimizer):
            self.constrain_gradients()
        self._gradients_constrained = False
        if self.relative_step:
            self._normalise_gradients()
        for part in self.parts:
            bound_step = part.bound is not None and not part.bound.anchored
            if self.still or self.relative_step or self.measure_leak or bound_step:
                part.before = part.place.read().clone()

    def _is_linear(self, optimizer: Any) -> bool:
        """Whether moves are linear in the gradients: SGD, with or without momentum and weight decay, unclipped."""
        return type(optimizer) is torch.optim.SGD and self._zero_optimizer is None and not self.relative_step

    @torch.no_grad()
    def _after_step(self, optimizer: Any, *hook: Any) -> None:
        if not any(group["lr"] for group in optimizer.param_groups):
            return  # nothing has moved: torch's checkpoints make such steps to have an optimizer's state
        for part in self.parts:
            if self.still and part.before is not None:
                part.place.write(part.before)
            elif part.bound is not None:
                part.constrain()
        if self.relative_step and not self.still:
            self._rescale_step(optimizer.param_groups[0]["lr"])
        self._show_written()
        if self.measure_leak:
            self.leak = self._leak()
        for part in self.parts:
            part.before = None
        self.still = False

    def _normalise_gradients(self) -> None:
        """Bring the gradients to the norm of the trained weights, so that `lr` times them is not lost in rounding."""
        places = [part.place for part in self.parts]
        found = [(place, gradient) for place in places if (gradient := place.gradient()) is not None]
        if not found:
            return
        gradients = [gradient for _, gradient in found]
        weight = _norm([place.read() for place in places], places)
        size = _norm(gradients, [place for place, _ in found])
        torch._foreach_mul_(gradients, torch.where(size > 0, weight / size, 1.0))
        for place, gradient in found:
            place.set_gradient(gradient)

    def _rescale_step(self, relative: float) -> None:
        """Give the realised step the norm `relative * |weights|`; of an adapter the merged step and weight count."""
        moves = [(part.place, part.before) for part in self.parts if part.before is not None]
        now, before = [place.read() for place, _ in moves], [before for _, before in moves]
        plain = [i for i, part in enumerate(p for p in self.parts if p.before is not None) if not part.factor]
        places = [moves[i][0] for i in plain]
        step, size = (torch.zeros((), device=before[0].device) for _ in range(2))
        if plain:
            step = _norm(torch._foreach_sub([now[i] for i in plain], [before[i] for i in plain]), places)
            size = _norm([before[i] for i in plain], places)
        step = torch.stack([step, *(adapter.step_norm() for adapter in self.adapters)]).norm()
        size = torch.stack([size, *(adapter.norm() for adapter in self.adapters)]).norm()
        if step > 0:
            scale = (1 - relative * size / step).item()
            torch._foreach_lerp_(now, before, scale)
            for (place, _), local in zip(moves, now, strict=True):
                place.write(local)

    def _leak(self) -> float | None:
        """`|D U| / |D|` of the last realised step, over all weights with an anchored constraint."""
        squares: list[Tensor] = []
        groups: list[Any] = []
        for part in self.parts:
            if part.bound is not None and part.bound.anchored and part.before is not None:
                step_OI = part.matrix(part.place.read().float() - part.before.float())
                squares.append(local_squares([step_OI - part.bound(step_OI), step_OI]))
                groups += [group_of(step_OI)] * 2
        if not squares:
            return None
        removed, total = sum_over_shards(torch.cat(squares), groups).view(-1, 2).sum(0).tolist()
        return (removed / total) ** 0.5 if total else None


def _norm(tensors: Sequence[Tensor], places: Sequence[Whole]) -> Tensor:
    """The norm of all values together."""
    return sum_over_shards(local_squares(tensors), [place.group for place in places]).sum().sqrt()
