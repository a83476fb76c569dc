"""Tokens of a complete text, and which of them belong to a part of it.

A text is always tokenized as a whole: a tokenizer may merge characters across the border of two parts, or write a
space or an end token at the border of two texts, so the tokens of the parts are not those of the text.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

from hf_unlearn.data.formats import Row
from hf_unlearn.models.tasks import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span: TypeAlias = tuple[int, int]
"""The first character of a part of a text, and the one behind its last."""


def tokens_of_parts(
    text: str, parts: Sequence[Span], tokenizer: "PreTrainedTokenizerBase", special: bool = True, target: bool = False
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
        target: The text is the answer of an encoder-decoder.
    """
    tokens, spans = _tokens_with_spans(text, tokenizer, special, target)
    chosen = [False] * len(tokens)
    for start, end in parts:
        if spans is None:
            first, behind = (
                shared_length(encode(text[:place], tokenizer, special, target), tokens) if place else 0
                for place in (start, end)
            )
            behind = len(tokens) if end >= len(text) else behind
        else:
            first = next((i for i, (_, last) in enumerate(spans) if last > start), len(tokens))
            behind = next((i for i in range(first, len(tokens)) if spans[i][0] >= end), len(tokens))
            behind = len(tokens) if end >= len(text) else behind
        chosen[first:behind] = [True] * (behind - first)
    return tokens, chosen


def tokens_of_spans(
    text: str, spans: Sequence[Span], tokenizer: "PreTrainedTokenizerBase", special: bool = True, target: bool = False
) -> list[bool]:
    """Return for each token of a text whether it has a character of one of the spans; special tokens have none.

    Arguments are those of `tokens_of_parts`.
    """
    tokens, chosen = tokens_of_parts(text, spans, tokenizer, special, target)
    unknown = getattr(tokenizer, "unk_token_id", None)  # which stands for characters
    without = {tokenizer.eos_token_id, *getattr(tokenizer, "all_special_ids", ())} - {unknown}
    return [is_chosen and token not in without for token, is_chosen in zip(tokens, chosen, strict=True)]


def encode(text: str, tokenizer: "PreTrainedTokenizerBase", special: bool = True, target: bool = False) -> list[int]:
    """Return the tokens of a text, or with `target` those that an encoder-decoder writes."""
    if target:
        return list(tokenizer(text_target=text)["input_ids"])
    return list(tokenizer.encode(text) if special else tokenizer.encode(text, add_special_tokens=False))


def with_end(tokens: list[int], tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return tokens that end with the tokenizer's end token, if it has one."""
    end = tokenizer.eos_token_id
    return tokens if end is None or (tokens and tokens[-1] == end) else [*tokens, end]


@dataclass(frozen=True)
class RowText:
    """The text of an encoded row of a language model.

    Attributes:
        text: The text, without the tokenizer's begin token, and without its end token unless a chat template writes it.
        parts: Where the labels are.
        begin, end: The begin and the end token that the row has besides, or nothing.
        labels_end: Whether the end token is a label.
    """

    text: str
    parts: tuple[Span, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]
    labels_end: bool

    @classmethod
    def of(cls, row: Row, tokenizer: "PreTrainedTokenizerBase") -> "RowText | None":
        """Return the text of a row, or None if the tokenizer does not make the row's own tokens of it."""
        tokens = [int(token) for token in row["input_ids"]]
        chosen = [int(label) != IGNORED for label in row["labels"]]
        first, last = _special(tokenizer.bos_token_id), _special(tokenizer.eos_token_id)
        begin = first if first and tuple(tokens[:1]) == first else ()
        ends_turns = bool(getattr(tokenizer, "chat_template", None))
        end = last if last and tuple(tokens[-1:]) == last and not ends_turns else ()
        behind = len(tokens) - len(end)
        content, answers = tokens[len(begin) : behind], chosen[len(begin) : behind]
        borders = [i for i in range(len(answers) + 1) if i in (0, len(answers)) or answers[i] != answers[i - 1]]
        lengths = [len(_decode(content[:border], tokenizer)) for border in borders]
        runs = zip(borders, pairwise(lengths), strict=False)
        text, parts = _decode(content, tokenizer), tuple(span for border, span in runs if answers[border])
        if tokens_of_parts(text, parts, tokenizer, special=False) != (content, answers):
            return None
        return cls(text, parts, begin, end, bool(end) and chosen[-1])


def after_others(shown: Sequence[RowText], row: RowText, tokenizer: "PreTrainedTokenizerBase") -> dict[str, list[int]]:
    """Return a row with other rows before it: the tokens of the joined text, with labels on the row's own.

    The texts are separated by an empty line or, where a chat template writes them, by what it writes around turns.
    """
    separator = "" if getattr(tokenizer, "chat_template", None) else "\n\n"
    before = "".join(other.text + separator for other in shown)
    parts = [(start + len(before), end + len(before)) for start, end in row.parts]
    tokens, chosen = tokens_of_parts(before + row.text, parts, tokenizer, special=False)
    tokens = [*row.begin, *tokens, *row.end]
    chosen = [*[False] * len(row.begin), *chosen, *[row.labels_end] * len(row.end)]
    labels = [token if is_answer else IGNORED for token, is_answer in zip(tokens, chosen, strict=True)]
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}


def _special(token: int | None) -> tuple[int, ...]:
    return () if token is None else (token,)


def _decode(tokens: list[int], tokenizer: "PreTrainedTokenizerBase") -> str:
    return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _tokens_with_spans(
    text: str, tokenizer: "PreTrainedTokenizerBase", special: bool, target: bool = False
) -> tuple[list[int], list[Span] | None]:
    if not getattr(tokenizer, "is_fast", False):
        return encode(text, tokenizer, special, target), None
    options: dict[str, Any] = {"add_special_tokens": special, "return_offsets_mapping": True, "verbose": False}
    encoded = tokenizer(**{"text_target" if target else "text": text}, **options)
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
