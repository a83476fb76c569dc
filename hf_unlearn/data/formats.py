"""The columns that raw rows may have, by task; `encoders` turns such rows into model inputs.

- Language model: `messages`, `prompt` + `completion` or `text` (TRL), `question` + `answer` (TOFU), or `prompt` + `gt`
  (MUSE).
- Text classification: `text` or `sentence`, or a pair of sentences; and `label`.
- Token classification: `tokens` or `words`, and a tag for each: `ner_tags`, `pos_tags`, `tags` or `labels`.
- Seq2seq: `source` + `target`, `text` + `summary`, `document` + `summary`, `article` + `highlights`, or the pairs of
  TRL and TOFU.
- Image classification: `image` or `img`, and `label`.

A row of a language model may also have an `alternate` answer.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

Row = Mapping[str, Any]
"""One row: values by column name, raw or encoded."""


class Rows(Protocol):
    """Rows that can be counted and read by number: a list, a `datasets.Dataset`, or a torch `Dataset` with a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Row: ...


def rows_of(rows: Rows) -> Iterator[Row]:
    """Yield the rows in order.

    >>> list(rows_of([{"text": "a"}, {"text": "b"}]))
    [{'text': 'a'}, {'text': 'b'}]
    """
    return (rows[index] for index in range(len(rows)))


LANGUAGE_PAIRS = (("prompt", "completion"), ("question", "answer"), ("prompt", "gt"))
LANGUAGE_FORMATS = ("messages", "prompt + completion", "question + answer", "text")
"""The formats of a language model, for error messages."""
TEXTS = (("text",), ("sentence",), ("sentence1", "sentence2"), ("premise", "hypothesis"))
WORDS = ("tokens", "words")
TAGS = ("ner_tags", "pos_tags", "tags", "labels")
SEQ2SEQ_PAIRS = (
    ("source", "target"),
    ("text", "summary"),
    ("document", "summary"),
    ("article", "highlights"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("text", "target"),
)
IMAGES = ("image", "img")
LABELS = ("label", "labels", "label_ids")
MODEL_INPUTS = ("input_ids", "pixel_values", "inputs_embeds", "input_features", "input_values")
"""A row with one of these columns is encoded already."""


def with_answer(row: Row, answer: str | Sequence[Row]) -> dict[str, Any]:
    """Return a raw row of a language model with another answer: a text or, for conversations, a list of messages.

    >>> with_answer({"question": "Where?", "answer": "In Ulm."}, "I don't know.")
    {'question': 'Where?', 'answer': "I don't know."}
    """
    messages = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else list(answer)
    if "messages" in row:
        return {**row, "messages": [*row["messages"][:-1], *messages]}
    if "completion" in row:
        return {**row, "completion": answer if isinstance(row["completion"], str) else messages}
    return {**row, "answer" if "answer" in row else "text": answer}
