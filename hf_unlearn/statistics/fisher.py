"""The backward pass of the Fisher: its labels are sampled from the model's own prediction, reproducibly for each row.

Shapes: B rows, T positions, L label positions of the batch, V classes or vocabulary entries.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_unlearn.errors import ModelError
from hf_unlearn.models.forward import counted_labels, label_positions
from hf_unlearn.models.tasks import IGNORED, shifts_labels

MAX_FISHER_SIZE = 1 << 14
"""Most columns of an exact Fisher: a 16384 x 16384 float64 matrix takes 2 GiB."""


def backward_from_sampled_labels(
    model: nn.Module, logits: Tensor, inputs: Mapping[str, Tensor], mask_BT: Tensor | None, seeds: Sequence[int]
) -> int:
    """Run the backward pass of the summed negative log-likelihood of sampled labels; return the number of labels.

    Args:
        model: The model whose forward pass gave the logits.
        logits: `[B, V]` or `[B, T, V]`.
        inputs: The batch; its labels only say where the model predicts.
        mask_BT: Which positions count.
        seeds: One for each row, made from its content, so that a row gets the same labels in any batch.
    """
    labels = predicted_positions(logits, inputs, mask_BT)
    mask = label_positions(model, counted_labels(model, {**inputs, "labels": labels}))
    if logits.ndim == 3 and shifts_labels(model):
        logits = logits[:, :-1]
    logits_LV = logits[mask].float()
    labels_per_row = mask.reshape(len(mask), -1).sum(1).tolist()
    uniforms_L = torch.cat([row_uniforms(seed, count) for seed, count in zip(seeds, labels_per_row, strict=True)])
    sampled_L = sample_labels(logits_LV.detach(), uniforms_L.to(logits.device))
    F.cross_entropy(logits_LV, sampled_L, reduction="sum").backward()
    return len(sampled_L)


def sample_labels(logits_LV: Tensor, uniforms_L: Tensor) -> Tensor:
    """Draw one label per position from `softmax(logits_LV)` by inverting its distribution function at `uniforms_L`.

    >>> logits_LV = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    >>> sample_labels(logits_LV, torch.tensor([0.2, 0.7]))
    tensor([0, 1])
    """
    cumulative_LV = logits_LV.double().softmax(-1).cumsum(-1)
    drawn_L1 = torch.searchsorted(cumulative_LV, uniforms_L.double().unsqueeze(1) * cumulative_LV[:, -1:], right=True)
    return drawn_L1.squeeze(1).clamp(max=logits_LV.shape[1] - 1)


def row_uniforms(seed: int, count: int) -> Tensor:
    """Return `count` uniform random numbers `[count]` in float64, the same for the same seed."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed % (1 << 63)), dtype=torch.float64)


def predicted_positions(logits: Tensor, inputs: Mapping[str, Tensor], mask_BT: Tensor | None) -> Tensor:
    """Return labels whose -100s say where the model does not predict: the batch's own, else all unmasked positions."""
    if "labels" in inputs:
        return inputs["labels"]
    if logits.ndim == 2:
        return torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    labels = torch.zeros(logits.shape[:2], dtype=torch.long, device=logits.device)
    return labels if mask_BT is None else labels.masked_fill(~mask_BT, IGNORED)


def check_fisher_sizes(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `ModelError` if a layer's Fisher has more than `MAX_FISHER_SIZE` columns."""
    for name, shape in shapes.items():
        if shape[-1] > MAX_FISHER_SIZE:
            raise ModelError(
                f"{name} has {shape[-1]} outputs, its Fisher {shape[-1]} x {shape[-1]} entries; leave it out of "
                "`layers`, or lower sketch_above"
            )
