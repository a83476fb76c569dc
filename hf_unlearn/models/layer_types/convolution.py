"""`torch.nn.Conv2d`: a linear map of the patch under the kernel, at each output position and in each group of channels.

Shapes: B images, C channels, H x W pixels, P output positions, G groups, I inputs and O outputs of one group.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from hf_unlearn.models.layers import Layer, register_layer


@register_layer(nn.Conv2d)
def convolution(module: nn.Conv2d) -> Layer | None:
    """Describe a convolution; None if its class computes something else."""
    if type(module).forward is not nn.Conv2d.forward:  # such as a layer that standardises its weight first
        return None
    groups, weight = module.groups, module.weight
    outputs, inputs = module.out_channels // groups, weight[0].numel()

    def rows(x: Tensor) -> Tensor:  # [B, C, H, W] -> [B, P, I] or [B, P, G, I]
        padding = module._reversed_padding_repeated_twice
        x = F.pad(x, padding, mode="constant" if module.padding_mode == "zeros" else module.padding_mode)
        patches = F.unfold(x, module.kernel_size, dilation=module.dilation, stride=module.stride)
        return by_group(patches if patches.ndim == 3 else patches.unsqueeze(0))

    def by_group(features: Tensor) -> Tensor:  # [B, G F, P] -> [B, P, F] or [B, P, G, F]
        last = features.transpose(1, 2)
        return last if groups == 1 else last.unflatten(2, (groups, -1))

    def output_rows(gradient: Tensor) -> Tensor:  # [B, G O, H, W] -> [B, P, O] or [B, P, G, O]
        return by_group((gradient if gradient.ndim == 4 else gradient.unsqueeze(0)).flatten(2))

    return Layer(outputs, inputs, blocks=groups, shape=tuple(weight.shape), rows=rows, output_rows=output_rows)
