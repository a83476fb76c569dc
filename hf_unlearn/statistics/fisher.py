"""The labels of the Fisher pass: sampled from the model's own prediction, reproducible for each row."""

from collections.abc import Mapping

import torch
from torch import Tensor

from hf_unlearn.errors import ModelError
from hf_unlearn.models.tasks import IGNORED

MAX_FISHER_SIZE = 1 << 14  # a 16384 x 16384 float64 matrix takes 2 GiB


def sample_labels(logits_LV: Tensor, uniforms_L: Tensor) -> Tensor:
    """Draw one label per position from `softmax(logits_LV)` by inverting its distribution function at `uniforms_L`."""
    cumulative_LV = logits_LV.double().softmax(-1).cumsum(-1)
    drawn_L1 = torch.searchsorted(cumulative_LV, uniforms_L.double().unsqueeze(1) * cumulative_LV[:, -1:], right=True)
    return drawn_L1.squeeze(1).clamp(max=logits_LV.shape[1] - 1)


def row_uniforms(seed: int, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed % (1 << 63)), dtype=torch.float64)


def fisher_labels(logits: Tensor, inputs: Mapping[str, Tensor], mask_BT: Tensor | None) -> Tensor:
    """Labels whose -100s say where the model predicts: the batch's own, or all unmasked positions."""
    if "labels" in inputs:
        return inputs["labels"]
    if logits.ndim == 2:
        return torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    labels = torch.zeros(logits.shape[:2], dtype=torch.long, device=logits.device)
    return labels if mask_BT is None else labels.masked_fill(~mask_BT, IGNORED)


def check_fisher_sizes(shapes: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        if shape[-1] > MAX_FISHER_SIZE:
            raise ModelError(
                f"{name} has {shape[-1]} outputs, its Fisher {shape[-1]} x {shape[-1]} entries; leave it out of "
                "`layers`, or lower sketch_above"
            )
