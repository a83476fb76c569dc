"""Tokens of a complete text, and which of them belong to a part of it.

A text is always tokenized as a whole: a tokenizer may merge characters across the border of two parts, or write a
space or an end token at the border of two texts, so the tokens of the parts are not those of the text.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span: TypeAlias = tuple[int, int]
"""The first character of a part of a text, and the one behind its last."""


def tokens_of_parts(
    text: str, parts: Sequence[Span], tokenizer: "PreTrainedTokenizerBase", special: bool = True
) -> tuple[list[int], list[bool]]:
    """Return the tokens of a text, and for each whether it has a character of one of the parts.

    Special tokens that the tokenizer adds at the end belong to a part that ends with the text.

    >>> class Words:  # stands for a tokenizer
    ...     def encode(self, text, add_special_tokens=True):
    ...         return [len(word) for word in text.split()]
    >>> tokens_of_parts("Ada lives in Ulm", [(9, 16)], Words())
    ([3, 5, 2, 3], [False, False, True, True])

    Args:
        text: The complete text.
        parts: Parts of it, in order.
        tokenizer: The tokenizer; a fast one says which characters a token has. For another, the part begins where the
            tokens of the text before it end.
        special: Add the tokenizer's special tokens.
    """
    tokens, spans = _tokens_with_spans(text, tokenizer, special)
    chosen = [False] * len(tokens)
    for start, end in parts:
        if spans is None:
            first = shared_length(encode(text[:start], tokenizer, special), tokens) if start else 0
            behind = len(tokens) if end >= len(text) else shared_length(encode(text[:end], tokenizer, special), tokens)
        else:
            first = next((i for i, (_, last) in enumerate(spans) if last > start), len(tokens))
            behind = next((i for i in range(first, len(tokens)) if spans[i][0] >= end), len(tokens))
            behind = len(tokens) if end >= len(text) else behind
        chosen[first:behind] = [True] * (behind - first)
    return tokens, chosen


def encode(text: str, tokenizer: "PreTrainedTokenizerBase", special: bool = True) -> list[int]:
    """Return the tokens of a text."""
    return list(tokenizer.encode(text) if special else tokenizer.encode(text, add_special_tokens=False))


def with_end(tokens: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return tokens that end with the tokenizer's end token, if it has one."""
    end = tokenizer.eos_token_id
    return tokens if end is None or (tokens and tokens[-1] == end) else [*tokens, end]


def _tokens_with_spans(
    text: str, tokenizer: "PreTrainedTokenizerBase", special: bool
) -> tuple[list[int], list[Span] | None]:
    if not getattr(tokenizer, "is_fast", False):
        return encode(text, tokenizer, special), None
    options: dict[str, Any] = {"add_special_tokens": special, "return_offsets_mapping": True, "verbose": False}
    encoded = tokenizer(text, **options)
    spans = [(int(start), int(end)) for start, end in encoded["offset_mapping"]]
    # some versions of tokenizers give tokens an empty span (with ignore_merges): such spans say nothing
    usable = max((end for _, end in spans), default=0) >= len(text.rstrip())
    return list(encoded["input_ids"]), spans if usable else None


def shared_length(left: Sequence[object], right: Sequence[object]) -> int:
    """Return the length of the longest beginning that two sequences share.

    >>> shared_length("Ulm", "Ulrich")
    2
    """
    low, high = 0, min(len(left), len(right))
    while low < high:  # slices compare much faster than items
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
