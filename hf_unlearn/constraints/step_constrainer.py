"""Constraining the steps of any torch optimizer through its step hooks."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hf_unlearn.constraints.base import ConstraintLike
from hf_unlearn.constraints.binding import bind_constraints
from hf_unlearn.constraints.drift import Drift, DriftMeter, step_leak
from hf_unlearn.constraints.layouts import ZeroOptimizer, publish_master_weights, reshard_gathered
from hf_unlearn.constraints.relative_step import RelativeStep
from hf_unlearn.constraints.trained_weights import trained_adapters, trained_weights
from hf_unlearn.core.processes import gather
from hf_unlearn.errors import SettingsError
from hf_unlearn.models.adapters import check_adapters
from hf_unlearn.models.trainable import check_covered
from hf_unlearn.statistics.retain_statistics import RetainStatistics


class EngineOptimizer(Protocol):
    """Accelerate's wrapper of the optimizer of a DeepSpeed engine."""

    optimizer: ZeroOptimizer
    step: Any


def constrain_optimizer(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    statistics: RetainStatistics,
    constraint: ConstraintLike,
    *,
    allow_exposed: Iterable[str] = (),
    relative_step: bool = False,
) -> torch.optim.Optimizer:
    """Make every `optimizer.step()` obey `constraint`, with any torch optimizer and any training loop.

    Call it on the original weights: they become the anchor. The same optimizer is returned. Its new attribute
    `constrainer` is a `StepConstrainer` (drift, original weights).

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_unlearn.constraints import EnergyConstraint, constrain_optimizer
    >>> from hf_unlearn.models.trainable import freeze_unprotected
    >>> from hf_unlearn.statistics import collect_statistics
    >>> _ = torch.manual_seed(0)
    >>> config = LlamaConfig(
    ...     vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    ... )
    >>> model = LlamaForCausalLM(config).eval()
    >>> statistics = collect_statistics(model, [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}], progress=False)
    >>> _ = freeze_unprotected(model, statistics.layers)
    >>> optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    >>> optimizer = constrain_optimizer(optimizer, model, statistics, EnergyConstraint(1.0))
    >>> retain, forget = torch.tensor([[1, 2, 3]]), torch.tensor([[7, 8, 9]])
    >>> with torch.no_grad():
    ...     retain_before, forget_before = model(retain).logits, model(forget).logits
    >>> (-model(forget, labels=forget).loss).backward()  # gradient ascent on the forget row
    >>> optimizer.step()
    >>> torch.allclose(model(retain).logits, retain_before, atol=1e-5)
    True
    >>> torch.allclose(model(forget).logits, forget_before, atol=1e-3)
    False
    >>> optimizer.constrainer.drift().relative < 1e-5
    True

    Args:
        optimizer: Any torch optimizer, or accelerate's wrapper of one.
        model: The model whose weights it trains.
        statistics: Statistics of these weights.
        constraint: One constraint, None, or a mapping from layer name patterns to either.
        allow_exposed: Shell patterns of parameters that may train without protection.
        relative_step: Rescale each step to the norm `lr * |weights|`, over all trained weights together. The learning
            rate is then the relative size of a step, whatever the scale of the loss.

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
    realised step; for SGD with or without momentum this equals applying them to the gradient.

    LoRA (base weight + `scaling * B A`): A gets the right factor R, B the left factor L. With an energy constraint A
    stays in the residual space, so that the merged move is exactly orthogonal to the core space. With the others A
    starts as `A_0 R^(1/2)`, and the steps of A and B are multiplied by R and L. These are the steps of
    `A = A' R^(1/2)`, `B = L^(1/2) B'` in A' and B'. The merged move always is `L^(1/2) X R^(1/2)` with X of rank r
    (exact). A small merged step is the unconstrained step of the same optimizer with L and R applied to the part
    through B and to the part through A respectively (approximate: a full-weight step has both applied to all of it).

    >>> import torch
    >>> from hf_unlearn.constraints import StepConstrainer
    >>> model = torch.nn.Linear(3, 2)
    >>> constrainer = StepConstrainer(model, None, None)  # no constraint: the control
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    >>> constrainer.attach(optimizer)
    >>> original = model.weight.detach().clone()
    >>> model(torch.ones(1, 3)).sum().backward()
    >>> optimizer.step()
    >>> torch.equal(model.weight, original)
    False
    >>> with constrainer.original():
    ...     torch.equal(model.weight, original)
    True
    >>> constrainer.restore()
    >>> torch.equal(model.weight, original)
    True

    Args:
        model: The model on its original weights.
        statistics: Statistics of these weights; may be None if `constraint` is.
        constraint: One constraint, None, or a mapping from layer name patterns to either.
        relative_step: Rescale each step to the norm `lr * |weights|`.

    Attributes:
        weights: The trained weights.
        adapters: The trained LoRA layers.
        skip_next_step: If true, the next step updates the optimizer state but not the weights.
        measure_leak: If true, each step sets `leak`.
        leak: Share of the last step in the core gradient space (`step_leak`); None if it was not measured.

    Raises:
        SettingsError: A constraint without statistics, or only one factor of an adapter is trainable.
        StatisticsError: As `bind_constraints`.
        ModelError: A weight, an adapter or a kind of sharding that is not supported.
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
        self.model, self.statistics = model, statistics
        self.skip_next_step = False
        self.measure_leak = False
        self.leak: float | None = None
        device = next(model.parameters()).device
        bound = bind_constraints(statistics, constraint, device) if statistics is not None else {}
        check_adapters(model)
        self.weights = trained_weights(model, bound)
        self.adapters = trained_adapters(model, self.weights)
        self._drift_meter = DriftMeter(statistics, self.weights, self.adapters)
        self._relative_step = RelativeStep(self.weights, self.adapters) if relative_step else None
        self._gradients_constrained = False
        self._zero_optimizer: ZeroOptimizer | None = None

    def __repr__(self) -> str:
        trained = f"weights={len(self.weights)}, adapters={len(self.adapters)}, statistics={self.statistics}"
        return f"StepConstrainer({trained}, relative_step={self._relative_step is not None})"

    def attach(self, optimizer: torch.optim.Optimizer | EngineOptimizer) -> None:
        """Register the step hooks on a torch optimizer, or wrap the steps of a DeepSpeed engine.

        The engine's optimizer steps on flat pieces of several weights; a hook of that optimizer could not tell the
        weights apart.
        """
        if isinstance(optimizer, torch.optim.Optimizer):
            optimizer.register_step_pre_hook(self._before_step)
            optimizer.register_step_post_hook(self._after_step)
            return
        engine_step, zero_optimizer = optimizer.step, optimizer.optimizer
        self._zero_optimizer = zero_optimizer
        if self._relative_step is not None:
            zero_optimizer.clip_grad = 0.0  # it would clip the gradients after they were scaled to the weights' norm

        def constrained_step(*args: Any, **kwargs: Any) -> Any:
            self._before_step(zero_optimizer)
            result = engine_step(*args, **kwargs)
            self._after_step(zero_optimizer)
            return result

        optimizer.step = constrained_step

    @torch.no_grad()
    def constrain_gradients(self) -> None:
        """Project the gradients of anchored constraints: before clipping and before they enter the optimizer's moments.

        What the constraint removes from the step must not use up the clipping norm or fill the moments. The step hook
        calls this if nobody called it before, unless the constrained move would be the same without it.
        """
        for weight in self.weights:
            if weight.anchored:
                weight.constrain_gradient()
        self._gradients_constrained = True

    def drift(self) -> Drift:
        """Return the predicted retain drift of the move so far; empty without statistics."""
        self._follow_sharding()
        return self._drift_meter.measure()

    @contextmanager
    def original(self) -> Iterator[None]:
        """Put the original weights into the model within a `with` block, without a second copy of the model."""
        self._follow_sharding()
        current = self._exchange([weight.anchor for weight in self.weights])
        try:
            yield
        finally:
            self._follow_sharding()
            self._exchange(current)

    def _exchange(self, values: Sequence[Tensor]) -> list[Tensor]:
        previous = [weight.layout.exchange(value) for weight, value in zip(self.weights, values, strict=True)]
        self._publish_master_weights()
        torch.clear_autocast_cache()  # autocast would use its low-precision copies of the previous weights
        return previous

    def has_moved(self) -> bool:
        """Return whether a trained weight differs from its original value, on any process (a collective call)."""
        self._follow_sharding()
        return any(gather(any(not torch.equal(weight.layout.read(), weight.anchor) for weight in self.weights)))

    def copy_weights(self) -> list[Tensor]:
        """Return copies of this process's values of the trained weights, for `restore`."""
        self._follow_sharding()
        return [weight.layout.read().clone() for weight in self.weights]

    @torch.no_grad()
    def restore(self, values: Sequence[Tensor] | None = None) -> None:
        """Write back values from `copy_weights`; default: the original weights."""
        self._follow_sharding()
        for weight, saved in zip(self.weights, values or [w.anchor for w in self.weights], strict=True):
            weight.layout.write(saved)
        self._publish_master_weights()

    def _publish_master_weights(self) -> None:
        if self._zero_optimizer is not None:
            publish_master_weights(self._zero_optimizer)

    def _follow_sharding(self) -> None:
        """Let FSDP free gathered parameters, and shard the anchors of parameters that were sharded since."""
        reshard_gathered(self.model)
        for weight in self.weights:
            weight.shard_anchor()

    @torch.no_grad()
    def _before_step(self, optimizer: torch.optim.Optimizer | ZeroOptimizer, *hook_arguments: Any) -> None:
        self._follow_sharding()
        if not self._gradients_constrained and not self._is_linear(optimizer):
            self.constrain_gradients()
        self._gradients_constrained = False
        if self._relative_step is not None:
            self._relative_step.normalise_gradients()
        needed_for_all = self.skip_next_step or self._relative_step is not None or self.measure_leak
        for weight in self.weights:
            constrains_step = weight.bound is not None and not weight.anchored
            if needed_for_all or constrains_step:
                weight.before = weight.layout.read().clone()

    def _is_linear(self, optimizer: torch.optim.Optimizer | ZeroOptimizer) -> bool:
        """Whether moves are linear in the gradients: SGD, with or without momentum and weight decay, unclipped.

        Constraining the gradients then changes nothing, since the constraint is linear too.
        """
        return type(optimizer) is torch.optim.SGD and self._zero_optimizer is None and self._relative_step is None

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer | ZeroOptimizer, *hook_arguments: Any) -> None:
        if not any(group["lr"] for group in optimizer.param_groups):
            return  # nothing moved: torch's checkpointing makes such steps to initialise the optimizer state
        for weight in self.weights:
            if self.skip_next_step and weight.before is not None:
                weight.layout.write(weight.before)
            elif weight.bound is not None:
                weight.constrain()
        if self._relative_step is not None and not self.skip_next_step:
            self._relative_step.rescale(optimizer.param_groups[0]["lr"])
        self._publish_master_weights()
        if self.measure_leak:
            self.leak = step_leak(self.weights)
        for weight in self.weights:
            weight.before = None
        self.skip_next_step = False
