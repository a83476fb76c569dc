"""Layers that can be protected: how each type makes the rows of a Gram of its inputs, and how it stores its weight.

A type is one registration with `register_layer`; those that the package knows are in `layer_types/`. Every other room
sees a layer only through its `Layer`, so a new type needs no change elsewhere.

Shapes: N rows (positions), I input features, O output features, G blocks.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import Tensor, nn

from hf_unlearn.core.registry import TypeRegistry
from hf_unlearn.errors import ModelError
from hf_unlearn.models.adapters import base_name

BlockRows = Sequence[tuple[Tensor, Tensor]]
"""For each block its rows `[n, I]`, and the numbers `[n]` of the input positions that they came from."""


@dataclass(frozen=True)
class Layer:
    """A linear map `y = W x + b` of each input row: its sizes, its rows, and how its weight is stored.

    With several blocks (the groups of a convolution, the experts of a mixture) there is one map and one Gram per block:
    `outputs` and `inputs` are the sizes of one block, and the weight is viewed as `[G, O, I]`.

    >>> layer = Layer(outputs=2, inputs=3, transposed=True)
    >>> layer.gram_shape, layer.fisher_shape
    ((3, 3), (2, 2))
    >>> layer.weight_OI(Tensor(3, 2)).shape
    torch.Size([2, 3])

    Attributes:
        outputs: O.
        inputs: I.
        transposed: The weight is stored as `[I, O]` (with blocks `[G, I, O]`) instead of torch's `[O, I]`.
        blocks: G.
        shape: The stored shape of the weight, if it is not such a matrix.
        rows: Maps the arguments of `forward` to the rows `[..., I]` that the weight multiplies (with blocks
            `[..., G, I]` or `BlockRows`; for a diagonal Gram the indices `[..., 1]`). None if the first argument holds
            the rows. Leading dimensions `[B, T]` or `[B * T]` are those of the attention mask, if there is one.
        output_rows: Maps a gradient at the layer's output to its rows `[..., O]` or `[..., G, O]`. None if the gradient
            holds the rows.
        diagonal: Rows are one-hot, so the Gram is diagonal and kept as a vector.
        has_fisher: `forward` returns the map's own output, so gradients can be recorded there.
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
        """Whether the weight is one dense matrix over the rows of the first argument; it may be sharded or adapted."""
        return self.blocks == 1 and self.shape is None and self.rows is None and not self.diagonal

    @property
    def gram_shape(self) -> tuple[int, ...]:
        """`[I, I]`, `[G, I, I]`, or `[I]` if the Gram is diagonal."""
        return (self.inputs,) if self.diagonal else self._stacked(self.inputs, self.inputs)

    @property
    def fisher_shape(self) -> tuple[int, ...]:
        """`[O, O]` or `[G, O, O]`."""
        return self._stacked(self.outputs, self.outputs)

    def _stacked(self, *shape: int) -> tuple[int, ...]:
        return shape if self.blocks == 1 else (self.blocks, *shape)

    def weight_OI(self, tensor: Tensor) -> Tensor:
        """View the weight, its gradient or a step as `[O, I]` or `[G, O, I]`; copies only where no view exists."""
        if self.shape is not None:
            tensor = tensor.reshape(self._stacked(self.outputs, self.inputs))
        return _matrix_transpose(tensor) if self.transposed else tensor

    def stored(self, matrix_OI: Tensor) -> Tensor:
        """Return a matrix in the layout of the stored weight: the inverse of `weight_OI`."""
        if self.transposed:
            matrix_OI = _matrix_transpose(matrix_OI)
        return matrix_OI if self.shape is None else matrix_OI.reshape(self.shape)


def _matrix_transpose(matrix: Tensor) -> Tensor:
    return matrix.t() if matrix.ndim == 2 else matrix.mT


# The registry

Description = Layer | Mapping[str, Layer] | None
"""What a registered function returns for a module: see `register_layer`."""
Describe = TypeVar("Describe", bound=Callable[[Any], Description])

LAYER_TYPES: TypeRegistry[Callable[[Any], Description]] = TypeRegistry("layer type", "hf_unlearn.models.layer_types")


def register_layer(module_type: type[nn.Module]) -> Callable[[Describe], Describe]:
    """Decorator: tell how modules of a type, and of types derived from it, are protected.

    The decorated function gets a module and returns the `Layer` of its `weight`. For a module with several weights it
    returns a mapping from parameter names to layers, and None for a module that it cannot describe, whose weights are
    then frozen. Example, a linear layer that scales its input:

    >>> from hf_unlearn import Layer, register_layer
    >>> class Scaled(nn.Linear):
    ...     def forward(self, x):
    ...         return super().forward(3 * x)
    >>> @register_layer(Scaled)
    ... def scaled(module):
    ...     return Layer(module.out_features, module.in_features, rows=lambda x: 3 * x)
    >>> find_layers(nn.Sequential(Scaled(4, 2), nn.ReLU()))
    {'0': Scaled(in_features=4, out_features=2, bias=True)}
    >>> LAYER_TYPES.remove(Scaled)

    Raises:
        SettingsError: The type is registered already, with another function.
    """
    return LAYER_TYPES.register(module_type)


def layers_of(module: nn.Module) -> dict[str, Layer]:
    """Return the layer of each weight of a module that can be protected, by parameter name."""
    describe = LAYER_TYPES.find(module)
    description = None if describe is None else describe(module)
    return {"weight": description} if isinstance(description, Layer) else dict(description or {})


def describe_layer(module: nn.Module) -> Layer | None:
    """Return the layer of a module's `weight`, or None if its type cannot be protected.

    >>> describe_layer(nn.Linear(3, 2)).inputs, describe_layer(nn.LayerNorm(3))
    (3, None)
    """
    return layers_of(module).get("weight")


def layer_at(name: str, module: nn.Module) -> Layer:
    """Return the layer called `name` in `known_layers`, which is in `module`."""
    layers = layers_of(module)
    return layers["weight"] if "weight" in layers else layers[name.rpartition(".")[2]]


def parameter_of(name: str, module: nn.Module) -> str:
    """Return the parameter name of the layer called `name` in `known_layers`, which is in `module`."""
    return f"{name}.weight" if "weight" in layers_of(module) else name


# The layers of a model


def known_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return every layer of a known type by its name in the base model; a LoRA layer stands for its base layer.

    A layer has the name of its module or, if the module has several weights, of its parameter.

    >>> list(known_layers(nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2))))
    ['0', '1']
    """
    layers: dict[str, nn.Module] = {}
    last = ""
    for name, module in model.named_modules():
        inside_last = bool(last) and name.startswith(f"{last}.")  # such as the base layer and factors of a LoRA layer
        if not inside_last and (weights := layers_of(module)):
            layer = base_name(name)  # for modules_to_save the trained copy, which comes last
            layers |= {layer if key == "weight" else f"{layer}.{key}": module for key in weights}
            last = name
    return layers


def tied_parameters(model: nn.Module) -> dict[str, str]:
    """Return parameter names that are aliases of another one (`lm_head.weight` -> `model.embed_tokens.weight`).

    >>> model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    >>> model["b"].weight = model["a"].weight
    >>> tied_parameters(model)
    {'b.weight': 'a.weight'}
    """
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for raw, parameter in model.named_parameters(remove_duplicate=False):
        name = base_name(raw)
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    return tied


def find_layers(model: nn.Module, patterns: Iterable[str] | None = None, fisher: bool = False) -> dict[str, nn.Module]:
    """Return the layers of `model` to protect, by layer name (`known_layers`), in definition order.

    >>> model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    >>> list(find_layers(model)), list(find_layers(model, ["3"]))
    (['1', '3'], ['3'])

    Args:
        model: The model, with or without adapters.
        patterns: Shell patterns of layer names. None takes every layer of a known type except embeddings, including
            those of image patches (training them cost the digits demonstration two points of retain accuracy), the
            output embedding of language models (usually tied to the input embedding; its Fisher would have the size of
            the vocabulary squared), and layers whose weight is tied to another module's.
        fisher: Leave out layers without a Fisher, unless a pattern names them.

    Raises:
        ModelError: The model has no layer of a known type; a pattern matches none; a pattern asks for a tied layer or,
            with `fisher`, for a layer without a Fisher.
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
    if without := [name for name, module in chosen.items() if fisher and not layer_at(name, module).has_fisher]:
        raise ModelError(f"{without[0]} has no Fisher; leave it out of `layers`, or collect with fisher=False")
    return chosen


def _match(known: dict[str, nn.Module], patterns: list[str], tied: dict[str, str]) -> dict[str, nn.Module]:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in known):
            linear = [name for name, module in known.items() if layer_at(name, module).by_default] or list(known)
            raise ModelError(
                f"pattern {pattern!r} matches none of the {len(linear)} linear layers, such as {linear[0]!r}"
            )
    chosen = {}
    for name, module in known.items():
        if not any(fnmatchcase(name, pattern) for pattern in patterns):
            continue
        parameter = parameter_of(name, module)
        alias = next((f"{a} = {b}" for a, b in tied.items() if parameter in (a, b)), None)
        if alias and (layer_at(name, module).by_default or name in patterns):
            raise ModelError(f"{name} has a tied weight ({alias}); protecting one use would leave the other exposed")
        if not alias:  # a wide pattern that also matches a tied embedding does not ask for it
            chosen[name] = module
    return chosen
