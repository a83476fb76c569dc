"""Which parameters may change: each is protected by statistics, frozen, or explicitly exposed."""

import warnings
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from hf_unlearn.core.text import ShortRepr
from hf_unlearn.errors import CoverageError
from hf_unlearn.models.adapters import base_name, layer_of, lora_layers
from hf_unlearn.models.layers import layers_of, tied_parameters

UNKNOWN = "of an unknown layer type: "
"""How the reason begins for weights that are frozen because their layer type is not registered."""


@dataclass(frozen=True, repr=False)
class Coverage(ShortRepr):
    """Parameter names by what may happen to the parameters.

    >>> print(Coverage(("a.weight",), ("a.bias",), (), {"a.bias": "as asked"}).explain())
    1 protected, 1 frozen, 0 exposed
    frozen, as asked: a.bias

    Attributes:
        protected: Trainable, with statistics.
        frozen: Not trainable.
        exposed: Trainable without statistics; the guarantee does not hold for them.
        reasons: Why each frozen parameter is frozen.
    """

    protected: tuple[str, ...]
    frozen: tuple[str, ...]
    exposed: tuple[str, ...]
    reasons: Mapping[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """Return one line with the numbers, and the names of the exposed parameters."""
        exposed = f" ({', '.join(self.exposed)})" if self.exposed else ""
        return f"{len(self.protected)} protected, {len(self.frozen)} frozen, {len(self.exposed)} exposed{exposed}"

    def explain(self) -> str:
        """Return the summary, and one line per reason with the names of the parameters frozen for it."""
        names: dict[str, list[str]] = {}
        for name in self.frozen:
            names.setdefault(self.reasons[name], []).append(name)
        lines = [f"frozen, {reason}: {', '.join(frozen)}" for reason, frozen in names.items()]
        return "\n".join([self.summary(), *lines])


def freeze_unprotected(
    model: nn.Module, protected: Iterable[str], allow_exposed: Iterable[str] = (), freeze: Iterable[str] = ()
) -> Coverage:
    """Freeze what cannot be protected by default (biases, norms, embeddings), and report on every parameter.

    Weights of unknown layer types are frozen too, with one warning that names the types.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    >>> coverage = freeze_unprotected(model, ["0", "2"])
    >>> coverage.protected, model[0].bias.requires_grad
    (('0.weight', '2.weight'), False)

    Args:
        model: `requires_grad` of frozen parameters is set to false; parameters that are frozen already stay frozen.
        protected: Layer names with statistics; their weights may train.
        allow_exposed: Shell patterns of parameter names that may train without protection.
        freeze: Shell patterns of further parameter names to freeze.

    Raises:
        CoverageError: A parameter would train without statistics (the message lists all of them), or a pattern of
            `allow_exposed` or `freeze` matches nothing.
    """
    allow_exposed, freeze = tuple(allow_exposed), tuple(freeze)
    parameters = dict(model.named_parameters())
    for pattern in (*allow_exposed, *freeze):
        if not any(fnmatchcase(name, pattern) for name in parameters):
            raise CoverageError(f"pattern {pattern!r} matches no parameter, such as {next(iter(parameters))!r}")
    layers = set(protected)
    groups: dict[str, list[str]] = {"protected": [], "frozen": [], "exposed": [], "uncovered": []}
    default = _frozen_by_default(model)
    reasons: dict[str, str] = {}
    for name, parameter in parameters.items():
        if not parameter.requires_grad or any(fnmatchcase(name, p) for p in freeze):
            group = "frozen"
            reasons[name] = "as asked" if parameter.requires_grad else "as it was"
        elif any(fnmatchcase(name, p) for p in allow_exposed):
            group = "exposed"
        elif is_weight_of(name, layers):
            group = "protected"
        else:
            group = "frozen" if name in default else "uncovered"
            reasons |= {name: default[name]} if name in default else {}
        groups[group].append(name)
    if uncovered := groups.pop("uncovered"):
        raise CoverageError(
            f"trainable but without statistics: {', '.join(uncovered)}; freeze them (freeze=...), "
            f"collect statistics for them, or pass allow_exposed=({uncovered[0]!r}, ...)"
        )
    for name in groups["frozen"]:
        parameters[name].requires_grad_(False)
    _warn_unknown({name: reasons[name] for name in groups["frozen"]})
    return Coverage(**{group: tuple(names) for group, names in groups.items()}, reasons=reasons)


def _warn_unknown(reasons: Mapping[str, str]) -> None:
    unknown = {name: why for name, why in reasons.items() if why.startswith(UNKNOWN)}
    if unknown:
        types = sorted({why.removeprefix(UNKNOWN) for why in unknown.values()})
        warnings.warn(
            f"{len(unknown)} weights of unknown layer types are frozen ({', '.join(types)}; the first is "
            f"{next(iter(unknown))}); to protect them, register how each type multiplies its inputs with its weight, "
            f"@hf_unlearn.register_layer({types[0]}) def layer(module): return hf_unlearn.Layer(outputs=..., "
            "inputs=...), and collect statistics again",
            stacklevel=3,
        )


def freeze_all_but(model: nn.Module, patterns: Iterable[str]) -> None:
    """Freeze every parameter that matches none of the shell patterns; without patterns, freeze nothing.

    Raises:
        CoverageError: A pattern matches nothing.
    """
    patterns, parameters = tuple(patterns), dict(model.named_parameters())
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in parameters):
            raise CoverageError(
                f"train_only: pattern {pattern!r} matches no parameter, such as {next(iter(parameters))!r}"
            )
    for name, parameter in parameters.items():
        if patterns and not any(fnmatchcase(name, pattern) for pattern in patterns):
            parameter.requires_grad_(False)


def check_not_frozen(
    model: nn.Module, protected: Iterable[str], allow_exposed: Iterable[str] = (), kept_frozen: Iterable[str] = ()
) -> None:
    """Raise `CoverageError` if a parameter that should train was frozen before and nobody asked for it.

    PEFT leaves every weight of the base model frozen after `merge_and_unload`, and an earlier run leaves frozen what it
    did not train. Base weights under an adapter are frozen on purpose; the factors of the active adapter are not.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).requires_grad_(False)
    >>> check_not_frozen(model, ["0", "1"], kept_frozen=["0.*", "1.*"])
    >>> check_not_frozen(model, ["0", "1"])
    Traceback (most recent call last):
        ...
    hf_unlearn.errors.CoverageError: all 2 parameters that should train are frozen (the first is 0.weight; ...

    Args:
        model: The model, before anything is frozen for the run.
        protected: Layer names with statistics.
        allow_exposed: Shell patterns of parameters that train without protection.
        kept_frozen: Shell patterns of parameters that shall not train.
    """
    layers, kept_frozen, allow_exposed = set(protected), tuple(kept_frozen), tuple(allow_exposed)
    active = _active_adapter_parameters(model)
    frozen_by_default = _frozen_by_default(model)
    wanted = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and not any(fnmatchcase(name, pattern) for pattern in kept_frozen)
        if (active is None and is_weight_of(name, layers) and name not in frozen_by_default)
        or (active is not None and name in active)
        or any(fnmatchcase(name, pattern) for pattern in allow_exposed)
    }
    frozen = [name for name, parameter in wanted.items() if not parameter.requires_grad]
    if frozen:
        share = "all" if len(frozen) == len(wanted) else f"{len(frozen)} of"
        raise CoverageError(
            f"{share} {len(wanted)} parameters that should train are frozen (the first is {frozen[0]}; PEFT leaves "
            f"them so after merge_and_unload, and so does an earlier run): call model.requires_grad_(True), or name "
            f"those to keep frozen, such as freeze=[{frozen[0]!r}]"
        )


def _active_adapter_parameters(model: nn.Module) -> set[str] | None:
    """Return the names of the active adapters' LoRA factors; None for a model without an adapter."""
    factors = [
        (name, name.split(".lora_")[1].split(".")[1]) for name, _ in model.named_parameters() if ".lora_" in name
    ]
    if not factors:
        return None
    active = {adapter for _, _, adapter in lora_layers(model)}
    return {name for name, adapter in factors if adapter in active}


def check_covered(
    model: nn.Module, trained: Iterable[nn.Parameter], protected: Iterable[str], allow_exposed: Iterable[str]
) -> None:
    """Raise `CoverageError` if an optimizer has a trainable parameter without statistics."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layers = set(protected)
    uncovered = [
        name
        for parameter in trained
        if parameter.requires_grad
        if not is_weight_of(name := names.get(id(parameter), "a parameter of another model"), layers)
        if not any(fnmatchcase(name, pattern) for pattern in allow_exposed)
    ]
    if uncovered:
        raise CoverageError(
            f"trainable but without statistics: {', '.join(uncovered)}; call freeze_unprotected(model, "
            f"statistics.layers) before you make the optimizer, or pass allow_exposed=({uncovered[0]!r}, ...)"
        )


def is_weight_of(parameter: str, layers: Container[str]) -> bool:
    """Return whether a parameter is the weight of one of the layers, or a factor of the layer's adapter."""
    return (parameter.endswith(".weight") and layer_of(parameter)[0] in layers) or base_name(parameter) in layers


def _frozen_by_default(model: nn.Module) -> dict[str, str]:
    """Return the parameters that are frozen unless they are protected, with the reason.

    These are biases, norms and other vectors; input and output embeddings and parameters tied to one; weights of
    unknown layer types; and parameters of a known type that are not the weight of its map.
    """
    output = getattr(model, "get_output_embeddings", lambda: None)()
    tied = tied_parameters(model)
    aliased = set(tied) | set(tied.values())
    reasons = {
        name: f"tied ({_alias(base_name(name), tied)})"
        for name, _ in model.named_parameters()
        if base_name(name) in aliased
    }
    for prefix, module in model.named_modules():
        embedding = isinstance(module, nn.Embedding) or module is output or "embed" in prefix
        layers = layers_of(module)
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if ".lora_" in name or name in reasons:  # an adapter is added on purpose: covered or an error, never frozen
                continue
            if parameter.ndim <= 1:
                reasons[name] = "a bias, norm or other vector"
            elif embedding or "embed" in name:
                reasons[name] = "an embedding"
            elif not layers:
                reasons[name] = f"{UNKNOWN}{type(module).__name__}"
            elif name.rpartition(".")[2] not in layers:
                reasons[name] = "not the weight of its layer"
            elif not layers[name.rpartition(".")[2]].has_fisher:
                reasons[name] = "a layer without a Fisher"
    return reasons


def _alias(name: str, tied: Mapping[str, str]) -> str:
    """Return the names of the parameters that a parameter is tied to."""
    return ", ".join([*([tied[name]] if name in tied else []), *(a for a, first in tied.items() if first == name)])
