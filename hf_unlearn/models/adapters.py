"""PEFT adapters: the base layer that an adapter's weight belongs to, and the adapters that constraints support.

A LoRA layer changes its base weight by `D = scaling * B A` (B `[O, r]`, A `[r, I]`). If A stays in the image of a
constraint's right factor and B in the image of its left factor, the merged change `D` is allowed at any rank. The base
weights are never changed. `constraints.StepConstrainer` documents what is exact.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_unlearn.core.registry import suggestion
from hf_unlearn.core.text import one_line
from hf_unlearn.errors import ModelError, SettingsError

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.lora import LoraLayer

_INSERTED = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.|$)")
_FACTOR = re.compile(r"(.+)\.lora_(A|B)\.[^.]+\.weight")
_FACTORS = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))  # LoRA adds their product
_KEEPS_BASE_WEIGHTS = (True, "gaussian", "eva")


def base_name(name: str) -> str:
    """Return the name that a module or parameter of a PEFT model has in the base model; keep other names.

    >>> base_name("base_model.model.lm_head.base_layer.weight")
    'lm_head.weight'
    """
    return _INSERTED.sub("", name.removeprefix("base_model.model."))


def is_adapter(name: str) -> bool:
    """Return whether a name of a state dict belongs to an adapter and not to the base model."""
    return ".lora_" in name or ".modules_to_save." in name


def layer_of(parameter: str) -> tuple[str, str]:
    """Return the base name of a parameter's layer, and the factor of an adapter that it is: "A", "B" or "".

    >>> layer_of("base_model.model.lm_head.lora_A.default.weight"), layer_of("lm_head.weight")
    (('lm_head', 'A'), ('lm_head', ''))
    """
    name = base_name(parameter)
    if factor := _FACTOR.fullmatch(name):
        return factor[1], factor[2]
    return name.rpartition(".")[0], ""


def without_wrapper(model: nn.Module) -> nn.Module:
    """Return the transformers model inside a `PeftModel`, with its adapters; return any other model unchanged."""
    wrapped = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
    return model.get_base_model() if wrapped else model  # type: ignore[operator]


def lora_layers(model: nn.Module) -> "Iterator[tuple[str, LoraLayer, str]]":
    """Yield base name, module and active adapter of each LoRA layer."""
    for name, module in model.named_modules():
        factors = getattr(module, "lora_A", None)
        if isinstance(factors, nn.ModuleDict):
            layer: Any = module
            yield from ((base_name(name), layer, adapter) for adapter in layer.active_adapters if adapter in factors)


def changed_adapter(model: nn.Module) -> str | None:
    """Return the base name of a module whose active adapter changes what it computes, or None.

    An adapter that is disabled or merged into the weights, and LoRA as it begins (a factor is 0), change nothing.
    """
    for name, module in model.named_modules():
        if getattr(module, "disable_adapters", False) or getattr(module, "merged", False):
            continue
        active = getattr(module, "active_adapters", None)
        if isinstance(active, (list, tuple)) and any(_changes(module, adapter) for adapter in active):
            return base_name(name)
    return None


def _changes(module: nn.Module, adapter: str) -> bool:
    """Return whether one adapter of a PEFT module changes what the module computes."""
    copies, original = getattr(module, "modules_to_save", None), getattr(module, "original_module", None)
    if isinstance(copies, nn.ModuleDict) and original is not None:
        mine = copies[adapter].state_dict() if adapter in copies else {}
        own = original.state_dict()
        return any(name not in own or not torch.equal(tensor, own[name]) for name, tensor in mine.items())
    names = getattr(module, "adapter_layer_names", ())
    owned = {name: getattr(module, name) for name in names if adapter in getattr(module, name, ())}
    if not owned:
        return False
    pairs = [pair for pair in _FACTORS if pair[0] in owned]
    if not pairs or adapter in getattr(module, "lora_variant", ()):
        return True  # another kind of adapter, which may scale or add anything
    return any(all(_nonzero(owned[name][adapter]) for name in pair) for pair in pairs)


def _nonzero(factor: "nn.Module | Tensor") -> bool:
    weight: Any = factor.weight if isinstance(factor, nn.Module) else factor
    return bool(torch.count_nonzero(weight))


def merged_state_dict(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the state dict of the base model with the active adapters merged; `model` itself does not change.

    Args:
        model: The model with its adapters.
        state: All weights by their names in `model`, needed if the model's own are sharded.
    """
    state = model.state_dict() if state is None else state
    merged = {
        base_name(name): tensor
        for name, tensor in state.items()
        if ".lora_" not in name and ".original_module." not in name
    }
    factors = {layer_of(name): tensor for name, tensor in state.items() if ".lora_" in name}
    for name, module, adapter in lora_layers(model):
        move_OI = module.scaling[adapter] * (factors[name, "B"] @ factors[name, "A"])
        weight = merged[f"{name}.weight"]
        merged[f"{name}.weight"] = weight + (move_OI.T if module.fan_in_fan_out else move_OI).to(weight)
    return merged


def with_adapter(model: nn.Module, peft_config: "PeftConfig") -> nn.Module:
    """Add an adapter to a model without one, as `peft.get_peft_model` does.

    Raises:
        SettingsError: `peft_config` is not a configuration of PEFT or does not fit the model, or the model has an
            adapter already.
    """
    from peft import PeftConfig, get_peft_model

    if not isinstance(peft_config, PeftConfig):
        raise SettingsError(f"peft_config must be a peft.LoraConfig, got {type(peft_config).__name__}")
    if getattr(model, "peft_config", None):
        raise SettingsError("the model has an adapter already; pass either it or peft_config")
    try:
        return get_peft_model(model, peft_config)
    except ValueError as error:  # such as target modules that the model does not have
        raise SettingsError(f"LoRA settings: {one_line(error)}") from error


def check_target_modules(model: nn.Module, targets: Iterable[str]) -> None:
    """Raise `SettingsError` if a name is not the end of any module's name, as PEFT matches them.

    >>> check_target_modules(nn.Sequential(nn.Linear(2, 2)), ["q_proj"])
    Traceback (most recent call last):
        ...
    hf_unlearn.errors.SettingsError: the model has no module 'q_proj' to adapt (--lora_target_modules); choose from 0
    """
    kinds = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "weight")}
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise SettingsError(
                f"the model has no module {target!r} to adapt (--lora_target_modules); "
                f"{suggestion(target, sorted(kinds))}"
            )


def check_adapters(model: nn.Module) -> None:
    """Raise `ModelError` for adapters whose merged change is not `scaling * B A`, or that are trained already."""
    for adapter, config in (getattr(model, "peft_config", None) or {}).items():
        method = getattr(config.peft_type, "value", config.peft_type)
        if method != "LORA":
            raise ModelError(f"adapter {adapter!r} is {method}; use LoRA, with or without rank stabilisation")
        if getattr(config, "use_dora", False):
            raise ModelError(f"adapter {adapter!r} uses DoRA, whose magnitudes rescale the whole weight: turn it off")
        if config.init_lora_weights not in _KEEPS_BASE_WEIGHTS:
            raise ModelError(
                f"adapter {adapter!r} has init_lora_weights={config.init_lora_weights!r}, which changes the base "
                f"weights or starts with B != 0; use one of {', '.join(map(repr, _KEEPS_BASE_WEIGHTS))}"
            )
    for name, module, adapter in lora_layers(model):
        if adapter in getattr(module, "lora_variant", ()):
            raise ModelError(
                f"{name} has a variant of LoRA ({type(module.lora_variant[adapter]).__name__}); use plain LoRA"
            )
        if torch.count_nonzero(module.lora_B[adapter].weight):
            raise ModelError(
                f"the adapter of {name} has been trained (B is not 0); merge it (merge_and_unload), collect statistics "
                "of the merged model, and start with a new adapter"
            )
