"""Layer types that can be protected: how each makes rows of a Gram of its inputs, and how it stores its matrix.

A new type is one registration:

    @register_layer(MyLinear)
    def describe(module: MyLinear) -> Layer:
        return Layer(outputs=module.n_out, inputs=module.n_in)

Shapes: N rows (positions), I input features, O output features, G blocks.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import singledispatch
from typing import Any, TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from hf_unlearn.errors import ModelError
from hf_unlearn.models.adapters import base_name

BlockRows = Sequence[tuple[Tensor, Tensor]]
"""For each block its rows `[n, I]`, and the numbers `[n]` of the input positions that they came from."""


@dataclass(frozen=True)
class Layer:
    """A linear map `y = W x + b` of each input row: its sizes, its rows, and how its weight is stored.

    With several blocks (the groups of a convolution, the experts of a mixture) it is one map for each: `outputs` and
    `inputs` are those of one block, the weight is seen as `[G, O, I]`, and there is one Gram for each block.

    Attributes:
        outputs: O.
        inputs: I.
        transposed: The weight is stored as `[I, O]` (of blocks `[G, I, O]`) instead of torch's `[O, I]`.
        blocks: G.
        shape: The stored shape of the weight where that is no such matrix.
        rows: The arguments of `forward` -> the rows `[..., I]` that the weight multiplies (of blocks `[..., G, I]` or
            `BlockRows`; of a diagonal Gram their one-hot indices `[..., 1]`); None where the first argument has them.
            Leading dimensions `[B, T]` or `[B * T]` are those of the attention mask, if any.
        output_rows: A gradient at the layer's output -> its rows `[..., O]` or `[..., G, O]`; None where it has them.
        diagonal: Rows are one-hot, so that the Gram is diagonal and kept as a vector.
        has_fisher: `forward` returns the map's own output, so that gradients there can be seen.
        by_default: Protected without being asked for by name.
    """

    outputs: int
    inputs: int
    transposed: bool = False
    blocks: int = 1
    shape: tuple[int, ...] | None = None
    rows: Callable[..., Tensor | BlockRows] | None = field(default=None, compare=False)
    output_rows: Callable[[Tensor], Tensor] | None = field(default=None, compare=False)
    diagonal: bool = False
    has_fisher: bool = True
    by_default: bool = True

    @property
    def plain(self) -> bool:
        """Whether the weight is one dense matrix over the rows that it is given, which may be sharded or adapted."""
        return self.blocks == 1 and self.shape is None and self.rows is None and not self.diagonal

    @property
    def gram_shape(self) -> tuple[int, ...]:
        """`[I, I]`, `[G, I, I]` or, where it is diagonal, `[I]`."""
        return (self.inputs,) if self.diagonal else self._stacked(self.inputs, self.inputs)

    @property
    def fisher_shape(self) -> tuple[int, ...]:
        """`[O, O]` or `[G, O, O]`."""
        return self._stacked(self.outputs, self.outputs)

    def _stacked(self, *shape: int) -> tuple[int, ...]:
        return shape if self.blocks == 1 else (self.blocks, *shape)

    def weight_OI(self, tensor: Tensor) -> Tensor:
        """See the weight, its gradient or a step of it as `[O, I]`, or `[G, O, I]`: a view where there can be one."""
        if self.shape is not None:
            tensor = tensor.reshape(self._stacked(self.outputs, self.inputs))
        return _turned(tensor) if self.transposed else tensor

    def stored(self, matrix_OI: Tensor) -> Tensor:
        """The inverse of `weight_OI`."""
        if self.transposed:
            matrix_OI = _turned(matrix_OI)
        return matrix_OI if self.shape is None else matrix_OI.reshape(self.shape)


Description = Layer | Mapping[str, Layer] | None
Describe = TypeVar("Describe", bound=Callable[[Any], Description])


def register_layer(kind: type[nn.Module]) -> Callable[[Describe], Describe]:
    """Decorator: `describe(module)` says how modules of this type, and of types made from it, are protected.

    It returns the `Layer` of the module's `weight`; or, of a module with several weights, a mapping from parameter
    names to layers; or None for a module that it cannot describe, whose weights then are frozen.
    """

    def register(describe: Describe) -> Describe:
        _describe.register(kind, describe)
        return describe

    return register


def layers_of(module: nn.Module) -> dict[str, Layer]:
    """The description of each of a module's weights that can be protected, by parameter name."""
    found = _describe(module)
    return {"weight": found} if isinstance(found, Layer) else dict(found or {})


def describe_layer(module: nn.Module) -> Layer | None:
    """Description of a layer's `weight`; None where it is of a type that cannot be protected."""
    return layers_of(module).get("weight")


def layer_at(name: str, module: nn.Module) -> Layer:
    """The description of the layer `name` of `known_layers`, which is in `module`."""
    found = layers_of(module)
    return found["weight"] if "weight" in found else found[name.rpartition(".")[2]]


def parameter_of(name: str, module: nn.Module) -> str:
    """The name of the parameter of the layer `name` of `known_layers`, which is in `module`."""
    return f"{name}.weight" if "weight" in layers_of(module) else name


@singledispatch
def _describe(module: nn.Module) -> Description:
    new = "transformers" in sys.modules and _register_transformers_layers(module)
    if ("peft" in sys.modules and _register_peft_layers()) or new:
        return _describe(module)
    return None


@register_layer(nn.Linear)
def _linear(module: nn.Linear) -> Layer:
    return Layer(outputs=module.out_features, inputs=module.in_features)


@register_layer(nn.Conv2d)
def _convolution(module: nn.Conv2d) -> Layer | None:
    """Each output position is a linear map of the patch under the kernel, in each group of channels of its own."""
    if type(module).forward is not nn.Conv2d.forward:  # such as one that standardises its weight first
        return None
    groups, weight = module.groups, module.weight
    outputs, inputs = module.out_channels // groups, weight[0].numel()

    def rows(x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, P, I] or [B, P, G, I], P output positions
        padding = module._reversed_padding_repeated_twice
        x = F.pad(x, padding, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
        patches = F.unfold(x, module.kernel_size, dilation=module.dilation, stride=module.stride)
        return by_group(patches if patches.ndim == 3 else patches.unsqueeze(0))

    def by_group(features: Tensor) -> Tensor:  # [B, G F, P] -> [B, P, F] or [B, P, G, F]
        turned = features.transpose(1, 2)
        return turned if groups == 1 else turned.unflatten(2, (groups, -1))

    def output_rows(gradient: Tensor) -> Tensor:  # [B, G O, H, W]
        return by_group((gradient if gradient.ndim == 4 else gradient.unsqueeze(0)).flatten(2))

    return Layer(outputs, inputs, blocks=groups, shape=tuple(weight.shape), rows=rows, output_rows=output_rows)


@register_layer(nn.Embedding)
def _embedding(module: nn.Embedding) -> Layer | None:
    """A linear map of one-hot rows: its Gram counts tokens, and those that the retain set has stay as they are."""
    if type(module).forward is not nn.Embedding.forward or module.max_norm is not None or module.sparse:
        return None
    return Layer(
        outputs=module.embedding_dim, inputs=module.num_embeddings, transposed=True,
        rows=lambda indices: indices.unsqueeze(-1), diagonal=True, by_default=False,
    )  # fmt: skip


def _experts(module: Any) -> dict[str, Layer] | None:
    """The fused experts of transformers 5 (`use_experts_implementation`): a map for each, of the rows routed to it."""
    gated = "gate_up_proj" if module.has_gate else "up_proj"
    up, down = getattr(module, gated), module.down_proj
    if module.has_bias or module._is_expert_parallel or len(up) == 1:
        return None

    def routed(x: Tensor, chosen: Tensor, weights: Tensor) -> list[tuple[Tensor, Tensor]]:
        flat, chosen = x.reshape(-1, x.shape[-1]), chosen.reshape(-1, chosen.shape[-1])
        found = ((chosen == expert).any(1).nonzero().flatten() for expert in range(len(up)))
        return [(flat[positions], positions) for positions in found]

    def inner(x: Tensor, chosen: Tensor, weights: Tensor) -> list[tuple[Tensor, Tensor]]:
        act = module._apply_gate if module.has_gate else module.act_fn
        blocks = zip(routed(x, chosen, weights), getattr(module, gated), strict=True)
        return [(act(rows.to(w) @ (w if module.is_transposed else w.T)), positions) for (rows, positions), w in blocks]

    def layer(weight: Tensor, rows: Callable[..., BlockRows]) -> Layer:
        outputs, inputs = weight.shape[:0:-1] if module.is_transposed else weight.shape[1:]
        return Layer(outputs, inputs, module.is_transposed, len(weight), rows=rows, has_fisher=False)

    return {gated: layer(up, routed), "down_proj": layer(down, inner)}


def _router(module: Any) -> Layer:
    """`softmax(W x)`, top k: a linear map, though its output is not returned alone."""
    return Layer(outputs=module.weight.shape[0], inputs=module.weight.shape[1], has_fisher=False)


# whose forward pass multiplies the weight with the input as it is
ROUTERS = ("MixtralTopKRouter", "OlmoeTopKRouter", "Qwen2MoeTopKRouter", "Qwen3MoeTopKRouter")


def _register_transformers_layers(module: nn.Module) -> bool:
    """Register what transformers defines, late, so that this module need not import it; False if nothing is new."""
    from transformers.pytorch_utils import Conv1D

    kind, is_new = type(module), type(module) not in _describe.registry
    if is_new and all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate")):
        register_layer(kind)(_experts)
        return True
    if is_new and kind.__name__ in ROUTERS and kind.__module__.startswith("transformers."):
        register_layer(kind)(_router)
        return True
    if Conv1D in _describe.registry:
        return False

    @register_layer(Conv1D)
    def describe(module: Conv1D) -> Layer:  # GPT-2's linear layer, weight stored as [I, O]
        return Layer(outputs=module.nf, inputs=module.nx, transposed=True)

    return True


def _register_peft_layers() -> bool:
    """Register LoRA layers as their base layers: they see the same input and add to the same output."""
    from peft.tuners.lora import LoraLayer

    if LoraLayer in _describe.registry:
        return False

    @register_layer(LoraLayer)
    def describe(module: LoraLayer) -> Layer | None:
        return describe_layer(module.get_base_layer())

    return True


def known_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer of a known type, by its name in the base model; LoRA layers stand for what they wrap.

    A layer is named as its module, or, where that has several weights, as its parameter.
    """
    found: dict[str, nn.Module] = {}
    whole = ""
    for name, module in model.named_modules():
        if (not whole or not name.startswith(f"{whole}.")) and (layers := layers_of(module)):
            name_of = base_name(name)  # of modules_to_save the trained copy, which comes last
            found |= {name_of if key == "weight" else f"{name_of}.{key}": module for key in layers}
            whole = name
    return found


def tied_parameters(model: nn.Module) -> dict[str, str]:
    """Names of parameters that are another one's alias (`lm_head.weight` -> `model.embed_tokens.weight`)."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for raw, parameter in model.named_parameters(remove_duplicate=False):
        name = base_name(raw)
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    return tied


def find_layers(model: nn.Module, patterns: Iterable[str] | None = None, fisher: bool = False) -> dict[str, nn.Module]:
    """Layers of `model` to protect, by layer name (`known_layers`), in definition order.

    Args:
        patterns: Shell patterns of layer names. None takes every layer of a known type, but for embeddings, those of
            image patches too (training them cost the digits demonstration two points of retain accuracy), for the
            output embedding of language models (as a rule tied to the input one; its Fisher would be vocabulary size
            squared) and for layers whose weight is tied to another module's.
        fisher: Leave out by default what has no Fisher.

    Raises:
        ModelError: No layer of a known type; a pattern that matches none; a tied layer, or with `fisher` one that has
            none, asked for by name.
    """
    known = known_layers(model)
    if not known or (patterns is None and not any(layer_at(*layer).by_default for layer in known.items())):
        types = sorted({type(m).__name__ for m in model.modules() if any(True for _ in m.parameters(recurse=False))})
        raise ModelError(
            f"{type(model).__name__} has no linear layer, only {', '.join(types) or 'no parameters'}; "
            "register its layer types with hf_unlearn.register_layer"
        )
    tied = tied_parameters(model)
    partners = set(tied) | set(tied.values())
    if patterns is None:
        output = getattr(model, "get_output_embeddings", lambda: None)()
        return {
            name: module
            for name, module in known.items()
            if (layer := layer_at(name, module)).by_default and (layer.has_fisher or not fisher)
            if not (isinstance(module, nn.Conv2d) and "embed" in name)
            if parameter_of(name, module) not in partners and module is not output
        }
    chosen = _match(known, list(patterns), tied)
    if blind := [name for name, module in chosen.items() if fisher and not layer_at(name, module).has_fisher]:
        raise ModelError(f"{blind[0]} has no Fisher; leave it out of `layers`, or collect with fisher=False")
    return chosen


def _match(known: dict[str, nn.Module], patterns: list[str], tied: dict[str, str]) -> dict[str, nn.Module]:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            usual = [name for name, module in known.items() if layer_at(name, module).by_default] or list(known)
            example = usual[0]
            raise ModelError(f"pattern {pattern!r} matches none of the {len(usual)} linear layers, such as {example!r}")
    chosen = {}
    for name, module in known.items():
        if not any(fnmatchcase(name, pattern) for pattern in patterns):
            continue
        parameter = parameter_of(name, module)
        alias = next((f"{a} = {b}" for a, b in tied.items() if parameter in (a, b)), None)
        if alias and (layer_at(name, module).by_default or name in patterns):
            raise ModelError(f"{name} has a tied weight ({alias}); protecting one use would leave the other exposed")
        if not alias:  # a pattern that takes in a tied embedding besides others does not ask for it
            chosen[name] = module
    return chosen


def _turned(matrix: Tensor) -> Tensor:
    return matrix.t() if matrix.ndim == 2 else matrix.mT
