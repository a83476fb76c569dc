"""PEFT adapters: which base layer an adapter's weight belongs to, and which adapters a constraint can hold for.

A LoRA layer moves its base weight by `D = scaling * B A` (B `[O, r]`, A `[r, I]`). With A kept in the image of the
right factor of a constraint and B in that of the left one, the merged move `D` is allowed whatever the rank; the base
weights are never touched. See `optimizer.StepConstrainer` for what is exact.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_unlearn.errors import ModelError, SettingsError

_INSERTED = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.|$)")
_FACTOR = re.compile(r"(.+)\.lora_(A|B)\.[^.]+\.weight")
_KEEPS_BASE_WEIGHTS = (True, "gaussian", "eva")


def base_name(name: str) -> str:
    """The name that a module or parameter of a PEFT model has in the base model; other names as they are."""
    return _INSERTED.sub("", name.removeprefix("base_model.model."))


def is_adapter(name: str) -> bool:
    """Whether a name of a state dict is an adapter's own: not a weight of the base model."""
    return ".lora_" in name or ".modules_to_save." in name


def layer_of(parameter: str) -> tuple[str, str]:
    """Base name of the layer that a parameter belongs to, and which factor of its adapter it is: "A", "B" or ""."""
    name = base_name(parameter)
    if factor := _FACTOR.fullmatch(name):
        return factor[1], factor[2]
    return name.rpartition(".")[0], ""


def without_wrapper(model: Any) -> nn.Module:
    """The transformers model inside a `PeftModel` (adapters stay in it); any other model as it is."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def lora_layers(model: nn.Module) -> Iterator[tuple[str, Any, str]]:
    """Base name, module and active adapter of each LoRA layer."""
    for name, module in model.named_modules():
        factors: Any = getattr(module, "lora_A", None)
        if isinstance(factors, nn.ModuleDict):
            layer: Any = module
            yield from ((base_name(name), layer, adapter) for adapter in layer.active_adapters if adapter in factors)


def merged_state_dict(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """State dict of the base model with the active adapters merged in; `model` itself stays as it is.

    Args:
        state: All weights by their names in `model`, where the model's own are sharded.
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


def with_adapter(model: nn.Module, peft_config: Any) -> nn.Module:
    """`peft.get_peft_model`, for a model that has no adapter yet."""
    from peft import PeftConfig, get_peft_model

    if not isinstance(peft_config, PeftConfig):
        raise SettingsError(f"peft_config must be a peft.LoraConfig, got {type(peft_config).__name__}")
    if getattr(model, "peft_config", None):
        raise SettingsError("the model has an adapter already; pass either it or peft_config")
    try:
        return get_peft_model(model, peft_config)
    except ValueError as error:  # such as target modules that the model has not
        raise SettingsError(f"LoRA settings: {str(error).splitlines()[0]}") from error


def check_adapters(model: nn.Module) -> None:
    """Raise `ModelError` for adapters whose merged move is not `scaling * B A`, or that have moved already."""
    for adapter, config in (getattr(model, "peft_config", None) or {}).items():
        kind = getattr(config.peft_type, "value", config.peft_type)
        if kind != "LORA":
            raise ModelError(
                f"adapter {adapter!r} is {kind}; only LoRA (with or without rank stabilisation) is handled"
            )
        if getattr(config, "use_dora", False):
            raise ModelError(f"adapter {adapter!r} uses DoRA, whose magnitudes rescale the whole weight: turn it off")
        if config.init_lora_weights not in _KEEPS_BASE_WEIGHTS:
            raise ModelError(
                f"adapter {adapter!r} has init_lora_weights={config.init_lora_weights!r}, which changes the base or "
                f"starts with B != 0; use one of {', '.join(map(repr, _KEEPS_BASE_WEIGHTS))}"
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
