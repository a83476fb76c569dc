"""Which parameters may move: every one is protected by statistics, frozen, or explicitly exposed."""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from hf_unlearn.adapters import base_name, layer_of
from hf_unlearn.errors import CoverageError
from hf_unlearn.layers import tied_parameters


@dataclass(frozen=True)
class Coverage:
    """Parameter names by what may happen to them."""

    protected: tuple[str, ...]
    frozen: tuple[str, ...]
    exposed: tuple[str, ...]

    def summary(self) -> str:
        """One line, with the exposed parameters by name: they are what the guarantee does not hold for."""
        exposed = f" ({', '.join(self.exposed)})" if self.exposed else ""
        return f"{len(self.protected)} protected, {len(self.frozen)} frozen, {len(self.exposed)} exposed{exposed}"


def freeze_unprotected(
    model: nn.Module, protected: Iterable[str], allow_exposed: Iterable[str] = (), freeze: Iterable[str] = ()
) -> Coverage:
    """Freeze what cannot be protected by default (biases, norms, embeddings) and sort all parameters.

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
    for name, parameter in parameters.items():
        if not parameter.requires_grad or any(fnmatchcase(name, p) for p in freeze):
            kind = "frozen"
        elif any(fnmatchcase(name, p) for p in allow_exposed):
            kind = "exposed"
        elif _is_weight_of(name, layers):
            kind = "protected"
        else:
            kind = "frozen" if name in default else "uncovered"
        sorted_names[kind].append(name)
    if uncovered := sorted_names.pop("uncovered"):
        raise CoverageError(
            f"trainable but without statistics: {', '.join(uncovered)}; freeze them (freeze=...), "
            f"collect statistics for them, or pass allow_exposed=({uncovered[0]!r}, ...)"
        )
    for name in sorted_names["frozen"]:
        parameters[name].requires_grad_(False)
    return Coverage(**{kind: tuple(names) for kind, names in sorted_names.items()})


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
        if not _is_weight_of(name := names.get(id(parameter), "a parameter of another model"), layers)
        if not any(fnmatchcase(name, pattern) for pattern in allow_exposed)
    ]
    if uncovered:
        raise CoverageError(
            f"trainable but without statistics: {', '.join(uncovered)}; call freeze_unprotected(model, "
            f"statistics.layers) before you make the optimizer, or pass allow_exposed=({uncovered[0]!r}, ...)"
        )


def _is_weight_of(parameter: str, layers: set[str]) -> bool:
    """Whether a parameter is the weight, or a factor of the adapter, of one of the layers."""
    return parameter.endswith(".weight") and layer_of(parameter)[0] in layers


def hold_norm_statistics(model: nn.Module) -> None:
    """Put batch norms in eval mode, so that forget batches do not enter their running statistics."""
    for module in model.modules():
        if getattr(module, "track_running_stats", False):
            module.eval()


def _frozen_by_default(model: nn.Module) -> set[str]:
    """Biases, norms and other vectors; input and output embeddings and whatever is tied to one."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    tied = tied_parameters(model)
    aliased = set(tied) | set(tied.values())
    frozen = {name for name, _ in model.named_parameters() if base_name(name) in aliased}
    for prefix, module in model.named_modules():
        embedding = isinstance(module, nn.Embedding) or module is output or "embed" in prefix
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if ".lora_" in name:  # asked for by name: covered or an error, never frozen in silence
                continue
            if embedding or parameter.ndim <= 1 or "embed" in name:
                frozen.add(name)
    return frozen
