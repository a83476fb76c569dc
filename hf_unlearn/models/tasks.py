"""The task a model solves, which decides what its rows and labels look like."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from torch import Tensor, nn

from hf_unlearn.models.adapters import without_wrapper

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedTokenizerBase, ProcessorMixin

IGNORED = -100
"""The label of positions that no loss reads, as in transformers."""
CONTENT_MASK = "content_mask"
"""Column of encoded rows: for each label 1 if it is content, which carries what was learned, and 0 if it is not.

It has as many values as `labels`. It never reaches a model, and is not part of a row's identity."""
DECODER_INPUTS = ("decoder_input_ids", "decoder_inputs_embeds")
"""Arguments that give an encoder-decoder its decoder inputs; without them it shifts the labels."""

Batch = Mapping[str, Tensor]
"""Arguments of a model's forward pass for B rows, by name: each tensor is `[B, ...]`."""
Collator = Callable[[Sequence[Mapping[str, Any]]], Batch]
"""Makes a batch of a list of encoded rows, such as `data.batches.PaddingCollator` or a collator of transformers."""
ProcessingClass: TypeAlias = "PreTrainedTokenizerBase | BaseImageProcessor | ProcessorMixin"
"""What makes model inputs of raw rows: a tokenizer, an image processor, or a processor that has both."""
Task = Literal["language-model", "seq2seq", "text-classification", "token-classification", "image-classification"]
"""A task by the name that transformers uses for it on the Hub, or the kind of language model."""

_TASK_OF_LOSS: dict[str | None, Task] = {
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForImageClassification": "image-classification",
}


def shifts_labels(model: nn.Module) -> bool:
    """Return whether the label of position t is predicted at position t - 1 (decoder-only language models).

    transformers derives `loss_type` from the class name and falls back to the causal loss if the name says nothing
    (`GPT2LMHeadModel`), also for decoders that see images (`...ForConditionalGeneration`). The same rule is used here.
    Only sequence outputs are shifted.
    """
    model = getattr(model, "module", model)
    config = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        return False
    return getattr(model, "loss_type", None) in (None, "ForCausalLM", "ForConditionalGeneration")


def task_of(model: nn.Module) -> Task | None:
    """Return the task of a model by its `loss_type` (which transformers derives from its class), or None if unknown.

    A language model is trained on the tokens of its own answer; one with an encoder for its input is a seq2seq model.

    >>> from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    >>> task_of(LlamaForCausalLM(LlamaConfig(**sizes)))
    'language-model'
    >>> task_of(BertForSequenceClassification(BertConfig(**sizes)))
    'text-classification'
    >>> task_of(nn.Linear(2, 2))
    """
    model = without_wrapper(getattr(model, "module", model))
    task = _TASK_OF_LOSS.get(getattr(model, "loss_type", None))
    if task is None and getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return "seq2seq"
    return task or ("language-model" if shifts_labels(model) else None)


def has_decoder(model: nn.Module) -> bool:
    """Return whether a model is an encoder-decoder, so that its labels are not at the positions of its input.

    >>> from transformers import T5Config, T5ForConditionalGeneration
    >>> sizes = dict(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    >>> has_decoder(T5ForConditionalGeneration(T5Config(**sizes))), has_decoder(nn.Linear(2, 2))
    (True, False)
    """
    return bool(getattr(getattr(getattr(model, "module", model), "config", None), "is_encoder_decoder", False))


def context_length(model: nn.Module) -> int | None:
    """Return the number of positions that the model was made for, or None if its configuration does not say.

    Positions of RoBERTa and the models made after it start behind the padding id, so it has fewer than its
    configuration says.
    """
    config = getattr(getattr(model, "module", model), "config", None)
    if config is None:
        return None
    inner = config.get_text_config() if hasattr(config, "get_text_config") else config
    positions = getattr(inner, "max_position_embeddings", None)
    if isinstance(positions, int) and positions < 0:  # how XLNet says that it has no limit
        positions = None
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None and (n_rows := _embedding_rows(module)):
            return n_rows - padding - 1
    return positions


def vocabulary_size(model: nn.Module) -> int | None:
    """Return the number of tokens that the model has an input embedding for, or None if it has none.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    >>> vocabulary_size(LlamaForCausalLM(LlamaConfig(**sizes)))
    64
    >>> vocabulary_size(nn.Linear(2, 2))
    """
    model = without_wrapper(getattr(model, "module", model))
    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # a model without tokens
        return None
    return _embedding_rows(embedding)


def _embedding_rows(embedding: object) -> int | None:
    """Return the number of rows of an embedding, which I-BERT's own kind says by its weight alone."""
    weight, rows = getattr(embedding, "weight", None), getattr(embedding, "num_embeddings", None)
    if rows is None and isinstance(weight, Tensor) and weight.ndim == 2:
        return len(weight)
    return rows if isinstance(rows, int) else None


def resize_remedy(rows: int) -> str:
    """Return what to do about a token id that the model, which has `rows` embeddings, does not have."""
    return (
        f"the model has embeddings for ids 0 to {rows - 1}; use the model's own tokenizer, or call "
        "model.resize_token_embeddings(len(tokenizer)) after adding tokens"
    )
