"""Norm of each row's loss gradient."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hf_unlearn.core.sharding import require_whole
from hf_unlearn.data.formats import Row, Rows
from hf_unlearn.evaluation.row_scores import map_rows
from hf_unlearn.models.forward import predict
from hf_unlearn.models.tasks import Collator


def gradient_norms(model: nn.Module, dataset: Rows, collator: Collator) -> NDArray:
    """Return the L2 norm of each row's loss gradient over all weights: `[N]` (Wang et al., 2024, arXiv 2402.17012).

    Each row is a backward pass of its own, in eval mode; gradients and `requires_grad` are restored. OpenUnlearning
    averages the norms of the individual parameters, in training mode, so that dropout adds noise.

    Raises:
        ModelError: The weights are sharded over processes.
    """
    require_whole(model, "the gradient-norm attack")
    weights = [p for p in model.parameters() if p.is_floating_point()]
    before = [(p.requires_grad, p.grad) for p in weights]
    device = next(model.parameters()).device

    def norm(rows: Sequence[Row]) -> list[float]:
        for weight in weights:
            weight.grad = None
        batch = {key: value.to(device) for key, value in collator(rows).items()}
        with torch.enable_grad():
            predict(model, batch).nll_L.mean().backward()
        norms = [torch.linalg.vector_norm(w.grad.float()) for w in weights if w.grad is not None]
        return [float(torch.linalg.vector_norm(torch.stack(norms)))]

    try:
        for weight in weights:
            weight.requires_grad_(True)
        return np.array(map_rows(norm, model, dataset, 1), dtype=np.float64)
    finally:
        for weight, (required, grad) in zip(weights, before, strict=True):
            weight.grad = None
            weight.requires_grad_(required)
            weight.grad = grad
