"""Slow, dense float64 twins of the package's formulas, written another way: loops, SVDs of raw rows, explicit inverses.

Nothing here calls what it is a twin of. Shapes: N positions, I input features, O output features, L labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

Array = np.ndarray


def _logits(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output.logits


def _alone(row: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """One row as a batch of one, without padding or mask."""
    name = "input_ids" if "input_ids" in row else "pixel_values"
    return {name: torch.as_tensor(row[name]).unsqueeze(0)}


def input_rows(model: nn.Module, rows: Sequence[Mapping[str, Any]], layer: str) -> Array:
    """Inputs `X_NI` that `layer` sees, each row of data run alone."""
    seen: list[Array] = []
    module = model.get_submodule(layer)
    original = module.forward

    def spy(x: torch.Tensor) -> torch.Tensor:
        conv = isinstance(module, nn.Conv2d)
        seen.extend(patches(module, x)[0] if conv else x.detach().double().reshape(-1, x.shape[-1]).numpy())
        return original(x)

    module.forward = spy  # type: ignore[method-assign]
    try:
        with torch.no_grad():
            for row in rows:
                model(**_alone(row))
    finally:
        del module.forward
    return np.stack(seen)


def patches(module: Any, x: torch.Tensor) -> Array:
    """What a convolution's kernel sees, `[G, N, I]`: loops over rows, groups, and positions, pixel by pixel.

    A pixel outside the image is found by the padding mode's rule for its coordinate.
    """
    images = x.detach().double().numpy()
    (high, wide), (down, right), (dh, dw) = module.kernel_size, module.stride, module.dilation
    height, width = images.shape[2:]
    if module.padding == "same":
        top, left = (dh * (high - 1)) // 2, (dw * (wide - 1)) // 2
        rest = dh * (high - 1) - top, dw * (wide - 1) - left
    else:
        top, left = (0, 0) if module.padding == "valid" else module.padding
        rest = top, left
    rows_out = (height + top + rest[0] - dh * (high - 1) - 1) // down + 1
    columns_out = (width + left + rest[1] - dw * (wide - 1) - 1) // right + 1
    channels = images.shape[1] // module.groups
    found: list[list[Array]] = [[] for _ in range(module.groups)]
    for image in images:
        for group in range(module.groups):
            for i in range(rows_out):
                for j in range(columns_out):
                    patch = np.zeros((channels, high, wide))
                    for c in range(channels):
                        for a in range(high):
                            for b in range(wide):
                                y = _inside(i * down + a * dh - top, height, module.padding_mode)
                                z = _inside(j * right + b * dw - left, width, module.padding_mode)
                                if y is not None and z is not None:
                                    patch[c, a, b] = image[group * channels + c, y, z]
                    found[group].append(patch.reshape(-1))
    return np.array(found)


def _inside(place: int, size: int, mode: str) -> int | None:
    if 0 <= place < size:
        return place
    if mode == "zeros":
        return None
    if mode == "reflect":
        return -place if place < 0 else 2 * (size - 1) - place
    return min(max(place, 0), size - 1) if mode == "replicate" else place % size


def gram_sum(rows_NI: Array) -> Array:
    """`sum_n x_n x_n^T`, position by position."""
    total_II = np.zeros((rows_NI.shape[1], rows_NI.shape[1]))
    for x_I in rows_NI:
        total_II += np.outer(x_I, x_I)
    return total_II


def sampled_labels(logits_LV: Array, seed: int) -> list[int]:
    """Labels by walking along the distribution function until a seeded uniform number is passed."""
    uniforms = torch.rand(
        len(logits_LV), generator=torch.Generator().manual_seed(seed % (1 << 63)), dtype=torch.float64
    ).tolist()
    labels = []
    for logits_V, uniform in zip(logits_LV, uniforms, strict=True):
        weights = [math.exp(z - logits_V.max()) for z in logits_V]
        total, label, passed = sum(weights), 0, weights[0]
        while passed <= uniform * total and label < len(weights) - 1:
            label += 1
            passed += weights[label]
        labels.append(label)
    return labels


def fisher_sum(
    model: nn.Module, row: Mapping[str, Any], layer: str, positions: Sequence[int] | None, seed: int
) -> tuple[Array, int]:
    """`Y^T Y` of one row, and its number of labels: one autograd call for each label position.

    `positions` are the logits' positions that predict a label; None for a classifier's single prediction. The gradient
    at the layer's output is that of a perturbation added to it.
    """
    model = model.eval()
    module, nudges = model.get_submodule(layer), []

    def nudge(_: nn.Module, __: Any, output: torch.Tensor) -> torch.Tensor:
        nudges.append(torch.zeros_like(output, requires_grad=True))
        return output + nudges[-1]

    handle = module.register_forward_hook(nudge)
    try:
        logits = _logits(model(**_alone(row)))[0]
    finally:
        handle.remove()
    logits_LV = logits.unsqueeze(0) if positions is None else logits[list(positions)]
    labels = sampled_labels(logits_LV.detach().double().numpy(), seed)

    def as_rows(output: torch.Tensor) -> Array:
        by_position = output.permute(0, 2, 3, 1) if output.ndim == 4 else output
        return by_position.reshape(-1, by_position.shape[-1]).detach().double().numpy()

    gradient_NO = np.zeros_like(as_rows(nudges[0]))
    for index, label in enumerate(labels):
        loss = -logits_LV[index].log_softmax(-1)[label]
        part = torch.autograd.grad(loss, nudges[0], retain_graph=True)[0]
        gradient_NO += as_rows(part)
    return gram_sum(gradient_NO), len(labels)


def leading_rank(values: Array, energy: float) -> int:
    """First count at which the partial sum of `values`, largest first, reaches `energy` of the whole."""
    total, reached = float(values.sum()), 0.0
    for count, value in enumerate(values, start=1):
        reached += float(value)
        if reached >= energy * total:
            return count
    return len(values)


def energy_projector(rows_NI: Array, energy: float, spectrum: str = "singular_values") -> Array:
    """`I - U U^T` from the SVD of the raw input rows; no Gram matrix is formed."""
    _, singular, right = np.linalg.svd(rows_NI, full_matrices=False)
    singular = singular[singular > 1e-7 * singular[0]]
    rank = len(singular) if energy == 1 else leading_rank(singular if "sing" in spectrum else singular**2, energy)
    return np.eye(rows_NI.shape[1]) - right[:rank].T @ right[:rank]


def shrinkage(matrix: Array, strength: float) -> Array:
    """`(I + A / (strength * mean_eig(A)))^-1` as an explicit inverse; the mean eigenvalue is the trace's share."""
    return np.linalg.inv(np.eye(len(matrix)) + matrix / (strength * np.trace(matrix) / len(matrix)))


def kronecker(step_OI: Array, gram_II: Array, fisher_OO: Array, strength_in: float, strength_out: float) -> Array:
    """The two-sided shrinkage as one linear system for `vec(D)` of size `O I`."""
    system = np.kron(np.linalg.inv(shrinkage(fisher_OO, strength_out)), np.linalg.inv(shrinkage(gram_II, strength_in)))
    return np.linalg.solve(system, step_OI.reshape(-1)).reshape(step_OI.shape)


def relative_drift(rows_NI: Array, move_OI: Array, original_OI: Array) -> float:
    """Change of a layer's outputs on raw rows, relative to the outputs: `|X D^T| / |X W_0^T|`."""
    return float(np.linalg.norm(rows_NI @ move_OI.T) / np.linalg.norm(rows_NI @ original_OI.T))


def second_order_kl(gram_II: Array, fisher_OO: Array, move_OI: Array, positions_per_label: float) -> float:
    """`1/2 vec(D)^T (fisher x gram) vec(D)` with the Kronecker product written out, in nats per label."""
    vector = move_OI.reshape(-1)
    return float(0.5 * positions_per_label * vector @ np.kron(fisher_OO, gram_II) @ vector)
