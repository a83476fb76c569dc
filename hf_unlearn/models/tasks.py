"""Which task a model solves, and what that says about its rows and labels."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from hf_unlearn.models.adapters import without_wrapper

IGNORED = -100
DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")
Batch = Mapping[str, Tensor]
Collator = Callable[[Sequence[Mapping[str, Any]]], Batch]
Task = Literal["language-model", "seq2seq", "text-classification", "token-classification", "image-classification"]
TASKS: dict[str | None, Task] = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
}


def shifts_labels(model: nn.Module) -> bool:
    """Whether the label of position t is predicted at position t - 1 (decoder-only language models).

    transformers derives `loss_type` from the class name and falls back to the causal loss where the name says
    nothing (`GPT2LMHeadModel`), as it does for decoders that also see images (`...ForConditionalGeneration`); the
    same rule is used here. Sequence outputs alone are ever shifted.
    """
    model = getattr(model, "module", model)
    config = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return False
    return getattr(model, "loss_type", None) in (None, "ForCausalLM", "ForConditionalGeneration")


def task_of(model: nn.Module) -> Task | None:
    """What kind of rows a model takes, by transformers' `loss_type` (that is, its class); None where that says nothing.

    A language model is one that is trained on the tokens of its own answer; with an encoder for its input it is one of
    seq2seq.
    """
    model = without_wrapper(getattr(model, "module", model))
    task = TASKS.get(getattr(model, "loss_type", None))
    if task is None and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "seq2seq"
    return task or ("language-model" if shifts_labels(model) else None)


def context_length(model: nn.Module) -> int | None:
    """Most positions that the model was made for, where its configuration says so."""
    config = getattr(getattr(model, "module", model), "config", None)
    if config is None:
        return None
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(inner, "max_position_embeddings", None)
