"""Which parameters may move: every one is protected by statistics, frozen, or explicitly exposed."""

import warnings
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from hf_unlearn.errors import CoverageError
from hf_unlearn.models.adapters import base_name, layer_of
from hf_unlearn.models.layers import layers_of, tied_parameters

UNKNOWN = "of an unknown layer type: "


@dataclass(frozen=True)
class Coverage:
    """Parameter names by what may happen to them."""

    protected: tuple[str, ...]
    frozen: tuple[str, ...]
    exposed: tuple[str, ...]
    reasons: Mapping[str, str] = field(default_factory=dict)
    """Why each frozen parameter is frozen."""

    def summary(self) -> str:
        """One line, with the exposed parameters by name: they are what the guarantee does not hold for."""
        exposed = f" ({', '.join(self.exposed)})" if self.exposed else ""
        return f"{len(self.protected)} protected, {len(self.frozen)} frozen, {len(self.exposed)} exposed{exposed}"

    def explain(self) -> str:
        """The summary, and a line for each reason that parameters are frozen for, with their names."""
        names: dict[str, list[str]] = {}
        for name in self.frozen:
            names.setdefault(self.reasons[name], []).append(name)
        return "\n".join([self.summary(), *(f"frozen, {why}: {', '.join(found)}" for why, found in names.items())])


def freeze_unprotected(
    model: nn.Module, protected: Iterable[str], allow_exposed: Iterable[str] = (), freeze: Iterable[str] = ()
) -> Coverage:
    """Freeze what cannot be protected by default (biases, norms, embeddings) and sort all parameters.

    Weights of layer types that are not known are frozen too, with one warning that names the types.

    Args:
        model: Its `requires_grad` flags are changed for frozen parameters; parameters frozen already stay so.
        protected: Layer names with statistics; their weights may train.
        allow_exposed: Shell patterns of parameter names that may train without protection.
        freeze: Shell patterns of parameter names to freeze besides.

    Raises:
        CoverageError: A parameter would train without statistics; the message lists all of them. A pattern of
            `allow_exposed` or `freeze` matches nothing.
    """
    allow_exposed, freeze = tuple(allow_exposed), tuple(freeze)
    parameters = dict(model.named_parameters())
    for pattern in (*allow_exposed, *freeze):
        if not any(fnmatchcase(name, pattern) for name in parameters):
            raise CoverageError(f"pattern {pattern!r} matches no parameter, such as {next(iter(parameters))!r}")
    layers = set(protected)
    sorted_names: dict[str, list[str]] = {"protected": [], "frozen": [], "exposed": [], "uncovered": []}
    default = _frozen_by_default(model)
    reasons: dict[str, str] = {}
    for name, parameter in parameters.items():
        if not parameter.requires_grad or any(fnmatchcase(name, p) for p in freeze):
            kind = "frozen"
            reasons[name] = "as asked" if parameter.requires_grad else "as it was"
        elif any(fnmatchcase(name, p) for p in allow_exposed):
            kind = "exposed"
        elif is_weight_of(name, layers):
            kind = "protected"
        else:
            kind = "frozen" if name in default else "uncovered"
            reasons |= {name: default[name]} if name in default else {}
        sorted_names[kind].append(name)
    if uncovered := sorted_names.pop("uncovered"):
        raise CoverageError(
            f"trainable but without statistics: {', '.join(uncovered)}; freeze them (freeze=...), "
            f"collect statistics for them, or pass allow_exposed=({uncovered[0]!r}, ...)"
        )
    for name in sorted_names["frozen"]:
        parameters[name].requires_grad_(False)
    _warn_unknown({name: reasons[name] for name in sorted_names["frozen"]})
    return Coverage(**{kind: tuple(names) for kind, names in sorted_names.items()}, reasons=reasons)


def _warn_unknown(reasons: Mapping[str, str]) -> None:
    unknown = {name: why for name, why in reasons.items() if why.startswith(UNKNOWN)}
    if unknown:
        kinds = sorted({why.removeprefix(UNKNOWN) for why in unknown.values()})
        warnings.warn(
            f"{len(unknown)} weights of layer types that are not known are frozen ({', '.join(kinds)}; the first is "
            f"{next(iter(unknown))}): to protect them instead, say how each type's inputs meet its weight, "
            f"@hf_unlearn.register_layer({kinds[0]}) def describe(module): return hf_unlearn.Layer(outputs=..., "
            "inputs=...), and collect again",
            stacklevel=3,
        )


def freeze_all_but(model: nn.Module, patterns: Iterable[str]) -> None:
    """Freeze every parameter that none of the shell patterns names; without patterns, none.

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


def check_covered(
    model: nn.Module, trained: Iterable[nn.Parameter], protected: Iterable[str], allow_exposed: Iterable[str]
) -> None:
    """Raise `CoverageError` where an optimizer holds a trainable parameter without statistics."""
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
    """Whether a parameter is the weight, or a factor of the adapter, of one of the layers."""
    return (parameter.endswith(".weight") and layer_of(parameter)[0] in layers) or base_name(parameter) in layers


def _frozen_by_default(model: nn.Module) -> dict[str, str]:
    """Why what is not protected is frozen: biases, norms and other vectors; input and output embeddings and whatever
    is tied to one; weights of unknown layer types, and what of a known one is no weight of its map."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    tied = tied_parameters(model)
    aliased = set(tied) | set(tied.values())
    why = {
        name: f"tied ({_alias(base_name(name), tied)})"
        for name, _ in model.named_parameters()
        if base_name(name) in aliased
    }
    for prefix, module in model.named_modules():
        embedding = isinstance(module, nn.Embedding) or module is output or "embed" in prefix
        layers = layers_of(module)
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if ".lora_" in name or name in why:  # an adapter is asked for by name: covered or an error, never frozen
                continue
            if parameter.ndim <= 1:
                why[name] = "a bias, norm or other vector"
            elif embedding or "embed" in name:
                why[name] = "an embedding"
            elif not layers:
                why[name] = f"{UNKNOWN}{type(module).__name__}"
            elif name.rpartition(".")[2] not in layers:
                why[name] = "not the weight of its layer"
            elif not layers[name.rpartition(".")[2]].has_fisher:
                why[name] = "a layer without a Fisher"
    return why


def _alias(name: str, tied: Mapping[str, str]) -> str:
    """What a parameter is one with."""
    return ", ".join([*([tied[name]] if name in tied else []), *(a for a, first in tied.items() if first == name)])
