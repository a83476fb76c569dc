"""Layers that transformers defines: GPT-2's `Conv1D`, the fused experts of mixtures, and their routers.

They are registered when the first one is looked up, so that this module need not import transformers.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hf_unlearn.models.layers import LAYER_TYPES, BlockRows, Layer, register_layer

ROUTERS = ("MixtralTopKRouter", "OlmoeTopKRouter", "Qwen2MoeTopKRouter", "Qwen3MoeTopKRouter")
"""Classes whose forward pass multiplies the weight with the input as it is."""
_EXPERTS_ATTRIBUTES = ("has_gate", "has_bias", "is_transposed", "_apply_gate")


def register_late(module: Any) -> None:
    """Register `Conv1D`, and the type of `module` if it is one of experts or a router."""
    from transformers.pytorch_utils import Conv1D

    owner = type(module)
    if Conv1D not in LAYER_TYPES:
        register_layer(Conv1D)(conv1d)
    if owner in LAYER_TYPES:
        return
    if all(hasattr(module, name) for name in _EXPERTS_ATTRIBUTES):
        register_layer(owner)(experts)
    elif owner.__name__ in ROUTERS and owner.__module__.startswith("transformers."):
        register_layer(owner)(router)


LAYER_TYPES.add_late("transformers", register_late)


def conv1d(module: Any) -> Layer:
    """Describe GPT-2's linear layer, whose weight is stored as `[I, O]`."""
    return Layer(outputs=module.nf, inputs=module.nx, transposed=True)


def experts(module: Any) -> dict[str, Layer] | None:
    """Describe the fused experts of transformers 5 (`use_experts_implementation`): one map per expert.

    The rows of an expert are the positions that the router sends to it. None with biases, expert parallelism, or a
    single expert.
    """
    gated = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = getattr(module, gated), module.down_proj
    if module.has_bias or module._is_expert_parallel or len(up) == 1:
        return None

    def routed(x: Tensor, chosen: Tensor, weights: Tensor) -> list[tuple[Tensor, Tensor]]:
        flat, chosen = x.reshape(-1, x.shape[-1]), chosen.reshape(-1, chosen.shape[-1])
        positions_of = ((chosen == expert).any(1).nonzero().flatten() for expert in range(len(up)))
        return [(flat[positions], positions) for positions in positions_of]

    def inner(x: Tensor, chosen: Tensor, weights: Tensor) -> list[tuple[Tensor, Tensor]]:
        act = module._apply_gate if module.has_gate else module.act_fn
        blocks = zip(routed(x, chosen, weights), getattr(module, gated), strict=True)
        return [(act(rows.to(w) @ (w if module.is_transposed else w.T)), positions) for (rows, positions), w in blocks]

    def layer(weight: Tensor, rows: Callable[..., BlockRows]) -> Layer:
        outputs, inputs = weight.shape[:0:-1] if module.is_transposed else weight.shape[1:]
        return Layer(outputs, inputs, module.is_transposed, len(weight), rows=rows, has_fisher=False)

    return {gated: layer(up, routed), "down_proj": layer(down, inner)}


def router(module: nn.Module) -> Layer:
    """Describe a router, `softmax(W x)` and top k: a linear map whose output is not returned alone."""
    weight: Any = module.weight
    return Layer(outputs=weight.shape[0], inputs=weight.shape[1], has_fisher=False)
