"""The columns that raw rows may have, by task; `encoders` turns such rows into model inputs.

- Language model: `messages`, `prompt` + `completion` or `text` (TRL), `question` + `answer` (TOFU), or `prompt` + `gt`
  (MUSE).
- Text classification: `text` or `sentence`, or a pair of texts (`TEXTS`); and `label`.
- Token classification: `tokens` or `words`, and a tag for each: `ner_tags`, `pos_tags`, `tags` or `labels`.
- Seq2seq: `source` + `target`, `text` + `summary`, `document` + `summary`, `article` + `highlights`, or the pairs of
  TRL and TOFU.
- Image classification: `image` or `img`, and `label`.

A row of a language model may also have an `alternate` answer. A row of a language model or of a seq2seq model may have
a `secret`: a text, or a list of texts, in its answer that carries what is to be forgotten. Other tasks ignore such a
column. Rows that are tokens already are in `tokenized`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from hf_unlearn.models.tasks import CONTENT_MASK

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


ASSISTANT = "assistant"
"""The role of the messages that a language model predicts."""
LANGUAGE_PAIRS = (("prompt", "completion"), ("question", "answer"), ("prompt", "gt"))
LANGUAGE_FORMATS = ("messages", "prompt + completion", "question + answer", "text")
"""The formats of a language model, for error messages."""
TEXTS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("question", "context"),
    ("text", "text_pair"),
    ("text1", "text2"),
    ("sentence_A", "sentence_B"),
    ("sentence_a", "sentence_b"),
    ("claim", "evidence"),
    ("query", "passage"),
    ("text",),
    ("sentence",),
)
"""The texts of a text classifier: a set must not have a part of another format besides those of its own."""
CONTEXTS = ("context", "passage")
"""Texts that a question may depend on; a language model reads only the question."""
SECRET = "secret"
"""The column of a raw row with the text, or the list of texts, in its answer that carries what is to be forgotten. Its
encoded row has the texts in the same column, as a list, and their tokens in `content_mask`."""
CONTENT_RULE = "content_rule"
"""The column of an encoded row with the name of the rule that made its `content_mask`."""
PHRASES = "content_phrases"
"""The column of an encoded row with the texts of its content, by which a generated answer is judged."""
CONTENT_COLUMNS = (CONTENT_MASK, CONTENT_RULE, PHRASES, SECRET)
"""Columns of encoded rows that say what is content; no model reads them."""
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

    In a conversation the other answer stands in place of the assistant's last one, and ends the conversation. A text
    gets the white space with which the row's own answer begins, because it follows the prompt directly.

    >>> with_answer({"question": "Where?", "answer": "In Ulm."}, "I don't know.")
    {'question': 'Where?', 'answer': "I don't know."}
    >>> with_answer({"prompt": "Where?", "completion": " In Ulm."}, "I don't know.")
    {'prompt': 'Where?', 'completion': " I don't know."}
    """
    messages = [{"role": ASSISTANT, "content": answer}] if isinstance(answer, str) else answer
    if "messages" in row:
        return {**row, "messages": [*row["messages"][: last_answer(row["messages"])], *messages]}
    name = next((answer for prompt, answer in LANGUAGE_PAIRS if prompt in row and answer in row), "text")
    own = row.get(name)
    if isinstance(own, (list, tuple)):
        return {**row, name: [*own[: last_answer(own)], *messages]}
    if isinstance(own, str) and isinstance(answer, str) and not answer[:1].isspace():
        answer = own[: len(own) - len(own.lstrip())] + answer
    return {**row, name: answer}


def last_answer(messages: Sequence[Row]) -> int:
    """Return the number of the assistant's last message, or of the last message if the assistant says nothing.

    >>> last_answer([{"role": "user"}, {"role": "assistant"}, {"role": "user"}])
    1
    """
    answers = [i for i, message in enumerate(messages) if message["role"] == ASSISTANT]
    return answers[-1] if answers else len(messages) - 1
