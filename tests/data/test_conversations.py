"""Laws of conversations: every answer of the assistant is a label and nothing that others say is, however the chat
template writes earlier turns; what cannot be encoded is an error that names the row. Each has a negative control."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.texts import CHAT, QUESTION, tokenizer
from hf_unlearn.data.encoding import encode_dataset
from hf_unlearn.errors import DataError

HEAD = "{% for m in messages %}"
GENERATION = "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
TEMPLATES = {
    "plain": HEAD + "<{{ m.role }}> {{ m.content }} <end> " + GENERATION,
    "trimming": HEAD + "<{{ m.role }}> {{ m.content | trim }} <end> " + GENERATION,
    "reasons at the end": HEAD  # as templates that show the reasoning of the last answer only
    + "<{{ m.role }}> {% if m.role == 'assistant' and loop.last %}Answer: {% endif %}{{ m.content }} <end> "
    + GENERATION,
    "system before the last question": HEAD  # as templates that write tools or rules before the last question
    + "{% if m.role == 'user' and (loop.last or (loop.index == messages | length - 1)) %}. {% endif %}"
    + "<{{ m.role }}> {{ m.content }} <end> "
    + GENERATION,
    "other prompt": HEAD
    + "<{{ m.role }}> {{ m.content }} <end> {% endfor %}{% if add_generation_prompt %}<assistant> . {% endif %}",
}


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


LONG = [*CHAT, turn("user", "where ?"), turn("assistant", "Bonn"), turn("user", "live ?"), turn("assistant", "Rome")]


def labelled(row: dict[str, Any], words: Any) -> list[str]:
    return words.convert_ids_to_tokens(label for label in row["labels"] if label != -100)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("turns", [2, 4, 5, 6])
def test_every_answer_is_a_label_and_nothing_else(name: str, turns: int) -> None:
    words = tokenizer(TEMPLATES[name])
    (row,) = encode_dataset([{"messages": LONG[:turns]}], words)
    answers = ["in Ulm . <end>", "Bonn <end>", "Rome <end>"][: turns // 2]
    found = " ".join(labelled(row, words)).replace("Answer: ", "")  # which this template adds to the last answer
    assert found == " ".join(answers)
    assert row["input_ids"] == words.apply_chat_template(LONG[:turns], return_dict=False)
    assert all(label in (-100, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))


def test_the_text_of_all_turns_is_not_labelled() -> None:  # negative control
    words = tokenizer(TEMPLATES["plain"])
    (row,) = encode_dataset([{"text": words.apply_chat_template(LONG, tokenize=False)}], words)
    assert "where" in labelled(row, words)


def test_earlier_answers_of_a_prompt_are_given() -> None:
    words = tokenizer(TEMPLATES["plain"])
    (row,) = encode_dataset([{"prompt": LONG[:3], "completion": LONG[3:]}], words)
    assert " ".join(labelled(row, words)) == "Bonn <end> Rome <end>"


@pytest.mark.parametrize(
    "row", [{"messages": LONG}, {"messages": LONG[:5]}, {"prompt": LONG[:1], "completion": LONG[1:]}]
)
def test_an_alternate_answer_replaces_the_last_one_and_is_its_only_label(row: dict[str, Any]) -> None:
    words = tokenizer(TEMPLATES["plain"])
    (encoded,) = encode_dataset([{**row, "alternate": "in Rome"}], words)
    assert " ".join(labelled(encoded["alternate"], words)) == "in Rome <end>"
    assert " ".join(labelled(encoded, words)).startswith("in Ulm . <end> Bonn <end>")
    assert words.decode(encoded["alternate"]["input_ids"]).endswith("<assistant> in Rome <end>")


STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ m.role + ' ' + m.content + ' ' }}{% endfor %}"
)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([turn("system", "in"), *CHAT], "no system role"),
        ([turn("user", [{"type": "text", "text": "in"}]), CHAT[1]], "rejects the conversation"),
        ([CHAT[0], turn("assistant", None)], "None in the content of message 1"),
        ([CHAT[0], turn("assistant", float("nan"))], "nan in the content of message 1"),
        ([CHAT[0], turn("assistant", " ")], "empty answer in message 1"),
        ([CHAT[0], {"content": "in"}], "no role in message 1"),
        (["in", "Ulm"], "no role in message 0"),
        ([CHAT[0]], "no answer to predict.*its roles: 'user'"),
        ([], "no list of messages"),
        (None, "no list of messages"),
        ("in Ulm", "no list of messages"),
    ],
)
def test_a_conversation_that_cannot_be_encoded_is_an_error_that_names_the_row(messages: Any, reason: str) -> None:
    rows = [{"messages": CHAT}, {"messages": messages}]
    with pytest.raises(DataError, match=rf"row 1 of the forget set.*{reason}"):
        encode_dataset(rows, tokenizer(STRICT), what="forget")
    assert len(encode_dataset(rows[:1], tokenizer(STRICT), what="forget")) == 1


def test_a_template_that_leaves_an_answer_out_is_an_error() -> None:
    words = tokenizer("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }} {% endif %}{% endfor %}")
    with pytest.raises(DataError, match=r"row 0 .* leaves out message 1"):
        encode_dataset([{"messages": CHAT}], words)


def test_contents_in_parts_are_encoded_where_the_template_takes_them() -> None:
    template = (
        "{% for m in messages %}<{{ m.role }}> {% if m.content is string %}{{ m.content }}"
        "{% else %}{% for part in m.content %}{{ part.text }} {% endfor %}{% endif %} <end> {% endfor %}"
        "{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    parts = [
        turn("user", QUESTION),
        turn("assistant", [{"type": "text", "text": "in Ulm"}, {"type": "text", "text": "."}]),
    ]
    words = tokenizer(template)
    assert encode_dataset([{"messages": parts}], words) == encode_dataset([{"messages": CHAT}], words)
