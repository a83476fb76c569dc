"""LoRA layers of PEFT, registered when the first one is looked up, so that this module need not import peft."""

from typing import Any

from hf_unlearn.models.layers import LAYER_TYPES, Layer, describe_layer, register_layer


def register_late(module: object) -> None:
    """Register LoRA layers."""
    from peft.tuners.lora import LoraLayer

    if LoraLayer not in LAYER_TYPES:
        register_layer(LoraLayer)(lora)


LAYER_TYPES.add_late("peft", register_late)


def lora(module: Any) -> Layer | None:
    """Describe a LoRA layer as its base layer: it sees the same input and adds to the same output."""
    return describe_layer(module.get_base_layer())
