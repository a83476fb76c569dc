"""Steps whose norm is the learning rate times the norm of the trained weights, whatever the scale of the loss."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_unlearn.constraints.layouts import Layout, local_squares, sum_over_shards
from hf_unlearn.constraints.trained_weights import TrainedAdapter, TrainedWeight


class RelativeStep:
    """Normalises the gradients before an optimizer step and rescales the realised step after it.

    Norms are over all trained weights together. An adapter counts with the norms of its merged step and base weight.
    """

    def __init__(self, weights: Sequence[TrainedWeight], adapters: Sequence[TrainedAdapter]):
        self._weights, self._adapters = weights, adapters

    def normalise_gradients(self) -> None:
        """Scale the gradients to the norm of the trained weights, so that `lr` times them is not lost in rounding."""
        layouts = [weight.layout for weight in self._weights]
        with_gradient = [(layout, gradient) for layout in layouts if (gradient := layout.gradient()) is not None]
        if not with_gradient:
            return
        gradients = [gradient for _, gradient in with_gradient]
        weight_norm = _norm([layout.read() for layout in layouts], layouts)
        gradient_norm = _norm(gradients, [layout for layout, _ in with_gradient])
        torch._foreach_mul_(gradients, torch.where(gradient_norm > 0, weight_norm / gradient_norm, 1.0))
        for layout, gradient in with_gradient:
            layout.set_gradient(gradient)

    def rescale(self, learning_rate: float) -> None:
        """Rescale the last step to the norm `learning_rate * |weights|`.

        `TrainedWeight.before` must hold the weights before the step. A zero step stays zero.
        """
        moved = [(weight, weight.layout, weight.before) for weight in self._weights if weight.before is not None]
        after, before = [layout.read() for _, layout, _ in moved], [values for _, _, values in moved]
        plain = [index for index, (weight, _, _) in enumerate(moved) if not weight.factor]
        step_norm, weight_norm = (torch.zeros((), device=before[0].device) for _ in range(2))
        if plain:
            layouts = [moved[index][1] for index in plain]
            plain_before = [before[index] for index in plain]
            step_norm = _norm(torch._foreach_sub([after[index] for index in plain], plain_before), layouts)
            weight_norm = _norm(plain_before, layouts)
        step_norm = torch.stack([step_norm, *(adapter.step_norm() for adapter in self._adapters)]).norm()
        weight_norm = torch.stack([weight_norm, *(adapter.norm() for adapter in self._adapters)]).norm()
        if step_norm > 0:
            weight_of_before = (1 - learning_rate * weight_norm / step_norm).item()
            torch._foreach_lerp_(after, before, weight_of_before)
            for (_, layout, _), values in zip(moved, after, strict=True):
                layout.write(values)


def _norm(tensors: Sequence[Tensor], layouts: Sequence[Layout]) -> Tensor:
    """The norm of all values together, of all processes."""
    return sum_over_shards(local_squares(tensors), [layout.group for layout in layouts]).sum().sqrt()
