"""Whether a model's own greedy answers still give away what was to be forgotten."""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from hf_unlearn.data.encoding import EncodedList
from hf_unlearn.data.formats import PHRASES, SECRET, Row, Rows, rows_of
from hf_unlearn.evaluation.generation import generate_answers
from hf_unlearn.models.tasks import CONTENT_MASK, IGNORED, context_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS, TOKENS = 100, 100
"""Most rows that are asked, and most tokens of an answer."""
FEWEST_LETTERS = 3
"""A guessed phrase with fewer letters, and without a digit, is not counted: nearly every answer has it."""
WORDS_END = "\u2e80"
"""From this character on, words are not separated by spaces (Chinese, Japanese)."""


def content_phrases(row: Row, tokenizer: "PreTrainedTokenizerBase", common: Collection[str] = frozenset()) -> list[str]:
    """Return the texts in a row's answer that give away what is to be forgotten: its secrets, if it names some.

    Otherwise they are the whole words of each run of content tokens, divided at punctuation and at words that say
    nothing of the row: those that its prompt has already, and those that are `common`. A single word that is too short
    is left out. In a conversation, the last answer with content counts.

    Args:
        row: An encoded row with a `content_mask`; its column `content_phrases`, if there is one, is the answer.
        tokenizer: The model's tokenizer.
        common: Words, casefolded, that rows which the model never saw have too.
    """
    if row.get(PHRASES) is not None:
        return list(row[PHRASES])
    if row.get(SECRET):
        return list(row[SECRET])
    asked = question(row)
    if asked is None:
        return []
    start, end = len(_prompt(asked)), len(asked["labels"])
    tokens = [int(label) for label in asked["labels"][start:end]]
    *before, text = tokenizer.batch_decode([tokens[:i] for i in range(len(tokens) + 1)], skip_special_tokens=True)
    borders = [len(part) for part in before] + [len(text)]
    (prompt,) = tokenizer.batch_decode([_prompt(asked)], skip_special_tokens=True)
    known = words_of(prompt) | set(common)
    found = [
        phrase
        for first, last in _runs(row[CONTENT_MASK][start:end])
        for phrase in _phrases(text, borders[first], borders[last], known)
    ]
    return list(dict.fromkeys(found))


def with_phrases(rows: Rows, tokenizer: "PreTrainedTokenizerBase", others: Iterable[Row] = ()) -> EncodedList:
    """Return rows with their content phrases in a column; the words of `others`, never-seen rows, are common."""
    common: set[str] = set()
    texts = [[token for token in map(int, row["input_ids"]) if token >= 0] for row in others]
    for text in tokenizer.batch_decode(texts, skip_special_tokens=True) if texts else ():
        common |= words_of(text)
    found = EncodedList(copy(row) if isinstance(row, dict) else dict(row) for row in rows_of(rows))
    for row in found:
        row[PHRASES] = content_phrases(row, tokenizer, common)
    found.raw, found.unknown = getattr(rows, "raw", None), getattr(rows, "unknown", None)
    return found


def words_of(text: str) -> set[str]:
    """Return the words of a text, casefolded.

    >>> sorted(words_of("Ada lives in Ulm."))
    ['ada', 'in', 'lives', 'ulm']
    """
    return {word.casefold() for word in re.findall(r"\w+", text)}


def question(row: Row) -> dict[str, Any] | None:
    """Return a row up to the end of its last answer with content, with labels on that answer only, or None.

    A text without a prompt is continued from its first content token on.
    """
    content, labels = list(row[CONTENT_MASK]), [int(label) for label in row["labels"]]
    last = max((place for place, is_content in enumerate(content) if is_content), default=0)
    if not last:
        return None
    start = next((place + 1 for place in reversed(range(last)) if labels[place] == IGNORED), 0)
    start = start or max(1, content.index(1))
    end = next((place for place in range(last, len(labels)) if labels[place] == IGNORED), len(labels))
    return {"input_ids": list(row["input_ids"])[:end], "labels": [IGNORED] * start + labels[start:end]}


def greedy_reveals(model: nn.Module, rows: Rows, tokenizer: "PreTrainedTokenizerBase", batch_size: int = 16) -> NDArray:
    """Return for each row 1 if the model's greedy answer has one of its content phrases, else 0: `[N]`, float64.

    NaN for rows that are not asked: those without content phrases, those whose prompt fills the context, and those
    behind the first `ROWS`. In a distributed run the processes share the rows.
    """
    context = context_length(model)
    asked: dict[int, dict[str, Any]] = {}
    phrases: dict[int, list[str]] = {}
    for number, row in enumerate(rows_of(rows)):
        asks = question(row)
        if len(asked) == ROWS or asks is None or (context is not None and len(_prompt(asks)) >= context):
            continue
        if found := content_phrases(row, tokenizer):
            asked[number], phrases[number] = asks, found
    reveals = np.full(len(rows), np.nan)
    if asked:
        longest = max(len(row["labels"]) - len(_prompt(row)) for row in asked.values())
        answers = generate_answers(model, list(asked.values()), tokenizer, min(longest, TOKENS), batch_size)
        for number, answer in zip(asked, answers, strict=True):
            reveals[number] = float(bool(revealed(rows[number], answer, phrases[number])))
    return reveals


def revealed(row: Row, answer: str, phrases: Sequence[str]) -> list[str]:
    """Return the phrases of a row that an answer has, in any case; a secret also counts inside a word.

    >>> revealed({}, "She lives in ULM.", ["Ulm", "Bonn"]), revealed({}, "in Ulmer", ["Ulm"])
    (['Ulm'], [])
    """
    return [phrase for phrase in phrases if has_phrase(answer, phrase, anywhere=bool(row.get(SECRET)))]


def has_phrase(text: str, phrase: str, anywhere: bool = False) -> bool:
    """Return whether a text has a phrase, in any case and with any white space; as whole words unless `anywhere`."""
    text, phrase = (" ".join(part.casefold().split()) for part in (text, phrase))
    start = text.find(phrase)
    while start >= 0:
        end = start + len(phrase)
        if anywhere or not (_joined(text, start) or _joined(text, end)):
            return True
        start = text.find(phrase, start + 1)
    return False


def _prompt(asked: Row) -> list[int]:
    """Return the tokens before the labels of a row of `question`."""
    return list(asked["input_ids"])[: next(i for i, label in enumerate(asked["labels"]) if label != IGNORED)]


def _runs(mask: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield where each run of ones begins and ends."""
    start = None
    for place, value in enumerate([*mask, 0]):
        if value and start is None:
            start = place
        if not value and start is not None:
            yield start, place
            start = None


def _joined(text: str, place: int) -> bool:
    """Return whether the characters on both sides of a place belong to one word."""
    return 0 < place < len(text) and all(c.isalnum() and c < WORDS_END for c in text[place - 1 : place + 1])


def _phrases(text: str, start: int, end: int, known: Collection[str]) -> Iterator[str]:
    """Yield the phrases in a part of a text: neighbouring whole words, none of which is known."""
    while 0 < start < end and _joined(text, start):
        start -= 1
    while start < end and _joined(text, end):
        end += 1
    span: tuple[int, int] | None = None
    for match in re.finditer(r"\w+", text[start:end]):
        word, (first, last) = match[0], match.span()
        is_known = word.casefold() in known
        if span is not None and (is_known or not _connects(text[start + span[1] : start + first])):
            yield from _telling(text[start:end][slice(*span)])
            span = None
        if not is_known:
            span = (first if span is None else span[0], last)
    if span is not None:
        yield from _telling(text[start:end][slice(*span)])


def _connects(between: str) -> bool:
    """Return whether two words with these characters between them belong to one phrase."""
    return not between.strip() or between in "-'\u2019"


def _telling(phrase: str) -> Iterator[str]:
    letters = [c for c in phrase if c.isalnum()]
    if len(letters) >= FEWEST_LETTERS or any(c.isdigit() or c >= WORDS_END for c in letters):
        yield phrase
