"""Answers by greedy decoding, and how similar they are to the true ones."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from hf_unlearn.core.processes import world
from hf_unlearn.data.formats import Row, Rows
from hf_unlearn.errors import DataError, ModelError, SettingsError
from hf_unlearn.evaluation.row_scores import map_rows
from hf_unlearn.models.tasks import IGNORED, context_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEW_TOKENS = 200  # TOFU; MUSE takes 128 for a continuation and 32 for an answer


def generate_answers(
    model: nn.Module,
    dataset: Rows,
    tokenizer: "PreTrainedTokenizerBase | None",
    max_new_tokens: int = NEW_TOKENS,
    batch_size: int = 16,
) -> list[str]:
    """Generate the model's answer to the prompt of each encoded row; return the texts in order.

    Decoding is greedy and without penalties; the model's own generation settings are ignored. In a distributed run each
    process decodes its share of the rows, and all return the answers to all rows.

    Raises:
        SettingsError: There is no tokenizer.
        ModelError: The model cannot generate from a prompt (an encoder, a classifier, an encoder-decoder).
        DataError: A row has no prompt, or its prompt fills the context.
    """
    from transformers import GenerationConfig

    tokenizer = require_tokenizer(tokenizer)
    if not can_answer(model):
        raise ModelError(
            f"{type(model).__name__} generates no text from a prompt; leave out metrics of generated answers"
        )
    end = tokenizer.eos_token_id
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    settings = GenerationConfig(
        max_new_tokens=_tokens_that_fit(model, dataset, max_new_tokens),
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        pad_token_id=0 if pad is None else pad,
        eos_token_id=end,
    )
    device = next(model.parameters()).device

    def answer(rows: Sequence[Row]) -> list[str]:
        prompts = [torch.as_tensor(_prompt(row)) for row in rows]
        tokens_BT = pad_sequence(prompts, True, settings.pad_token_id, "left").to(device)
        mask_BT = pad_sequence([torch.ones_like(p) for p in prompts], True, 0, "left").to(device)
        output_BT = model.generate(  # type: ignore[operator]
            tokens_BT, attention_mask=mask_BT, generation_config=settings, synced_gpus=world()[1] > 1
        )
        texts = tokenizer.batch_decode(output_BT[:, tokens_BT.shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]

    with torch.no_grad():
        return map_rows(answer, model, dataset, batch_size)


def can_answer(model: nn.Module) -> bool:
    """Return whether the model generates an answer to a prompt, as decoders do."""
    can_generate = getattr(model, "can_generate", None)
    is_encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return can_generate is not None and bool(can_generate()) and not is_encoder_decoder


def can_decode(tokenizer: object) -> bool:
    """Return whether a processing class makes texts of tokens."""
    return hasattr(tokenizer, "batch_decode")


def true_answers(
    dataset: Rows, tokenizer: "PreTrainedTokenizerBase | None", max_tokens: int | None = None
) -> list[str]:
    """Decode the labels of each encoded row (the last answer of a conversation), or the first `max_tokens` of them.

    Raises:
        SettingsError: There is no tokenizer.
        DataError: A row has no sequence of labels.
    """
    tokenizer = require_tokenizer(tokenizer)
    rows = (dataset[i] for i in range(len(dataset)))
    tokens = [[int(label) for label in _labels(row)[slice(*_last_answer(row))]][:max_tokens] for row in rows]
    return list(tokenizer.batch_decode(tokens, skip_special_tokens=True))


def _tokens_that_fit(model: nn.Module, dataset: Rows, max_new_tokens: int) -> int:
    """Return how many tokens can be generated after the longest prompt before the context ends."""
    context = context_length(model)
    longest = max(len(_prompt(dataset[i])) for i in range(len(dataset)))
    if context is not None and longest >= context:
        raise DataError(f"a prompt of {longest} tokens fills the context of {context}; cut it with max_length")
    return max_new_tokens if context is None else min(max_new_tokens, context - longest)


def _prompt(row: Row) -> list[int]:
    first, _ = _last_answer(row)
    if first == 0:
        raise DataError("a row has no prompt to generate from; give rows as prompt + completion or question + answer")
    return [int(token) for token in row["input_ids"][:first]]


def _last_answer(row: Row) -> tuple[int, int]:
    """Return where the last run of labels begins, and where it ends: a conversation may have several answers."""
    labels = [int(label) for label in _labels(row)]
    end = next((i + 1 for i in reversed(range(len(labels))) if labels[i] != IGNORED), 0)
    start = next((i + 1 for i in reversed(range(end)) if labels[i] == IGNORED), 0)
    return start, end


def _labels(row: Row) -> Sequence[int]:
    labels: Any = row.get("labels")
    if np.ndim(labels) == 0:
        raise DataError(
            "a row has no sequence of labels; the answer is where they are not -100, the prompt where they are"
        )
    return labels


def require_tokenizer(tokenizer: "PreTrainedTokenizerBase | None") -> "PreTrainedTokenizerBase":
    """Return the tokenizer; raise `SettingsError` if there is none."""
    if tokenizer is None or not can_decode(tokenizer):
        raise SettingsError("decoding texts needs the model's tokenizer; pass it as processing_class")
    return tokenizer


def rouge_l(
    predictions: Sequence[str], references: Sequence[str], measure: str = "recall", stemmer: bool = True
) -> NDArray:
    """Return the ROUGE-L `recall`, `precision` or `fmeasure` of each prediction against its reference: `[N]`.

    >>> rouge_l(["the cat sat"], ["the cat sat down"]).tolist()
    [0.75]
    """
    from rouge_score import rouge_scorer

    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=stemmer)
    pairs = zip(predictions, references, strict=True)
    return np.array(
        [getattr(scorer.score(true, answer)["rougeL"], measure) for answer, true in pairs], dtype=np.float64
    )
