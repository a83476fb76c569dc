"""Which columns of a batch a model's forward pass takes."""

from inspect import Parameter, signature

from torch import Tensor, nn

from hf_unlearn.models.adapters import without_wrapper
from hf_unlearn.models.tasks import CONTENT_MASK, DECODER_INPUTS, Batch

ALWAYS_PASSED = frozenset(
    "input_ids inputs_embeds pixel_values input_features input_values attention_mask token_type_ids position_ids "
    "decoder_attention_mask labels".split()
).union(DECODER_INPUTS)
"""Usual inputs: a model that does not take one raises an error, because to leave it out could change the result."""
_VARIABLE = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


def taken_inputs(model: nn.Module, inputs: Batch) -> dict[str, Tensor]:
    """Return a batch without the columns that the model's forward pass does not name, such as a row's number.

    The forward passes of transformers' models take any further argument (`**kwargs`) and ignore it, or hand it to a
    kernel, so such a column is left out as `Trainer` does. Another model that takes any argument gets all columns but
    `content_mask`, which is for losses and metrics.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    >>> batch = {"input_ids": torch.tensor([[5, 6]]), "idx": torch.tensor([0]), "labels": torch.tensor([[5, 6]])}
    >>> sorted(taken_inputs(LlamaForCausalLM(LlamaConfig(**sizes)), batch))
    ['input_ids', 'labels']
    """
    inner = without_wrapper(getattr(model, "module", model))
    parameters = signature(getattr(inner, "forward", inner)).parameters.values()  # the model may be a function
    takes_any = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters)
    named = {parameter.name for parameter in parameters if parameter.kind not in _VARIABLE}
    if takes_any and not (named and hasattr(inner, "main_input_name")):
        return {name: value for name, value in inputs.items() if name != CONTENT_MASK}
    return {name: value for name, value in inputs.items() if name in named or name in ALWAYS_PASSED}
