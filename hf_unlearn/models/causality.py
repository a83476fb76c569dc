"""Whether the tokens of a language model see those that follow them."""

import torch
from torch import nn

from hf_unlearn.models.adapters import without_wrapper
from hf_unlearn.models.modes import eval_mode
from hf_unlearn.models.tasks import task_of, vocabulary_size

_PROBE = 4  # tokens


def sees_what_follows(model: nn.Module) -> bool:
    """Return whether a model is a masked language model, or a language model whose tokens see those that follow.

    Attention modules that say whether they are causal are believed; otherwise a forward pass of a few tokens tells.

    >>> from transformers import XLMConfig, XLMWithLMHeadModel
    >>> sizes = {"vocab_size": 64, "emb_dim": 16, "n_layers": 1, "n_heads": 2}
    >>> [sees_what_follows(XLMWithLMHeadModel(XLMConfig(causal=causal, **sizes))) for causal in (True, False)]
    [False, True]
    """
    model = without_wrapper(getattr(model, "module", model))
    if getattr(model, "loss_type", None) == "ForMaskedLM":
        return True
    if task_of(model) != "language-model":
        return False
    causal = [value for module in model.modules() if isinstance(value := getattr(module, "is_causal", None), bool)]
    return not any(causal) if causal else _reads_the_next_token(model)


@torch.no_grad()
def _reads_the_next_token(model: nn.Module) -> bool:
    """Return whether the logits at a position change with the token behind it."""
    size, weight = vocabulary_size(model), next(model.parameters(), None)
    if size is None or weight is None or weight.is_meta:
        return False
    pad = getattr(model.config, "pad_token_id", None)  # which models look for
    usable = [token for token in range(size) if token != pad][: _PROBE + 1]
    if len(usable) < 2:
        return False
    ids_2T = torch.tensor([usable[:-1], [*usable[:-2], usable[-1]]], device=weight.device)
    with eval_mode(model):
        logits_2V = model(input_ids=ids_2T, attention_mask=torch.ones_like(ids_2T)).logits[:, -2]
    return not torch.allclose(logits_2V[0], logits_2V[1], rtol=1e-3, atol=1e-5)
