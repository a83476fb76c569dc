"""Layer types that can be protected: how each reads its input and lays out its weight.

A new type is one registration:

    @describe_layer.register
    def _(module: MyLinear) -> Layer:
        return Layer(outputs=module.n_out, inputs=module.n_in)

Shapes: N rows (positions), I input features, O output features.
"""

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import singledispatch

from torch import Tensor, nn

from hf_unlearn.adapters import base_name
from hf_unlearn.errors import ModelError


@dataclass(frozen=True)
class Layer:
    """A linear map `y = W x`: sizes, and whether the stored weight is `[I, O]` instead of torch's `[O, I]`."""

    outputs: int
    inputs: int
    transposed: bool = False

    def weight_OI(self, tensor: Tensor) -> Tensor:
        """View the weight, its gradient or a step of it as `[O, I]`; writing to the view writes to `tensor`."""
        return tensor.t() if self.transposed else tensor


@singledispatch
def describe_layer(module: nn.Module) -> Layer | None:
    """Description of a layer type that can be protected; None for any other."""
    new = "transformers" in sys.modules and _register_transformers_layers()
    if ("peft" in sys.modules and _register_peft_layers()) or new:
        return describe_layer(module)
    return None


@describe_layer.register
def _(module: nn.Linear) -> Layer:
    return Layer(outputs=module.out_features, inputs=module.in_features)


def _register_transformers_layers() -> bool:
    """Register what transformers defines, late, so that this module need not import it; False if done before."""
    from transformers.pytorch_utils import Conv1D

    if Conv1D in describe_layer.registry:
        return False

    @describe_layer.register
    def _(module: Conv1D) -> Layer:  # GPT-2's linear layer, weight stored as [I, O]
        return Layer(outputs=module.nf, inputs=module.nx, transposed=True)

    return True


def _register_peft_layers() -> bool:
    """Register LoRA layers as their base layers: they see the same input and add to the same output."""
    from peft.tuners.lora import LoraLayer

    if LoraLayer in describe_layer.registry:
        return False

    @describe_layer.register
    def _(module: LoraLayer) -> Layer | None:
        return describe_layer(module.get_base_layer())

    return True


def known_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer of a known type, by its name in the base model; LoRA layers stand for what they wrap."""
    found: dict[str, nn.Module] = {}
    whole = ""
    for name, module in model.named_modules():
        if (not whole or not name.startswith(f"{whole}.")) and describe_layer(module) is not None:
            found[base_name(name)] = module  # of modules_to_save the trained copy, which comes last
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


def find_layers(model: nn.Module, patterns: Iterable[str] | None = None) -> dict[str, nn.Module]:
    """Layers of `model` to protect, by module name, in definition order.

    Args:
        patterns: Shell patterns of module names. None takes every layer of a known type, but for the output embedding
            of language models (as a rule tied to the input one; its Fisher would be vocabulary size squared) and
            for layers whose weight is tied to another module's.

    Raises:
        ModelError: No layer of a known type; a pattern that matches none; a tied layer asked for by name.
    """
    known = known_layers(model)
    if not known:
        types = sorted({type(m).__name__ for m in model.modules() if any(True for _ in m.parameters(recurse=False))})
        raise ModelError(
            f"{type(model).__name__} has no linear layer, only {', '.join(types) or 'no parameters'}; "
            "register its layer types with hf_unlearn.layers.describe_layer"
        )
    tied = tied_parameters(model)
    partners = set(tied) | set(tied.values())
    if patterns is None:
        output = getattr(model, "get_output_embeddings", lambda: None)()
        return {n: m for n, m in known.items() if f"{n}.weight" not in partners and m is not output}
    return _match(known, list(patterns), tied)


def _match(known: dict[str, nn.Module], patterns: list[str], tied: dict[str, str]) -> dict[str, nn.Module]:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            example = next(iter(known))
            raise ModelError(f"pattern {pattern!r} matches none of the {len(known)} linear layers, such as {example!r}")
    chosen = {n: m for n, m in known.items() if any(fnmatchcase(n, p) for p in patterns)}
    for name in chosen:
        alias = next((f"{a} = {b}" for a, b in tied.items() if f"{name}.weight" in (a, b)), None)
        if alias:
            raise ModelError(f"{name} has a tied weight ({alias}); protecting one use would leave the other exposed")
    return chosen
