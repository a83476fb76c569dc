"""`torch.nn.Linear`, the plain case: the weight `[O, I]` multiplies the layer's input."""

from torch import nn

from hf_unlearn.models.layers import Layer, register_layer


@register_layer(nn.Linear)
def linear(module: nn.Linear) -> Layer:
    """Describe a linear layer."""
    return Layer(outputs=module.out_features, inputs=module.in_features)
