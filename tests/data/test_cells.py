"""Laws of cells: a missing value, a number, a list or broken Unicode never becomes a text, in any task and column; the
error names the row and the column. Each has a negative control."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.texts import ANSWER, QUESTION, tokenizer
from hf_unlearn.data.encoding import encode_dataset
from hf_unlearn.errors import DataError
from hf_unlearn.models.tasks import Task

GOOD: list[tuple[Task, dict[str, Any]]] = [
    ("language-model", {"text": QUESTION}),
    ("language-model", {"prompt": QUESTION, "completion": f" {ANSWER}"}),
    ("language-model", {"prompt": QUESTION, "gt": f" {ANSWER}"}),
    ("language-model", {"question": QUESTION, "answer": ANSWER}),
    ("seq2seq", {"source": QUESTION, "target": ANSWER}),
    ("text-classification", {"text": QUESTION}),
    ("text-classification", {"sentence1": QUESTION, "sentence2": ANSWER}),
]
CASES = [(task, row, column) for task, row in GOOD for column in row]
MISSING = object()


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("value", [None, float("nan"), 4, True, ["in", "Ulm"], b"in", "in \ud83d", MISSING])
@pytest.mark.parametrize(("task", "row", "column"), CASES)
def test_what_is_not_a_text_is_an_error(task: Task, row: Any, column: str, value: Any, template: bool) -> None:
    words = tokenizer() if template else tokenizer(template=None)
    bad = {name: cell for name, cell in {**row, column: value}.items() if cell is not MISSING}
    with pytest.raises(DataError, match=rf"row 1 of the forget set has .*column '{column}'"):
        encode_dataset([row, bad], words, task=task, what="forget")
    assert len(encode_dataset([row, row], words, task=task, what="forget")) == 2


@pytest.mark.parametrize("value", ["", " \n"])
@pytest.mark.parametrize(
    ("task", "row"), [case for case in GOOD if len(case[1]) == 2 and case[0] != "text-classification"]
)
def test_an_empty_answer_is_an_error(task: Task, row: Any, value: str) -> None:
    column = list(row)[1]
    with pytest.raises(DataError, match=rf"row 1 of the given set has no token to predict.*its {column} is empty"):
        encode_dataset([row, {**row, column: value}], tokenizer(template=None), task=task)


@pytest.mark.parametrize("words", [None, "in Ulm", ["in", None], ["in", 3], 7])
def test_words_must_be_lists_of_texts(words: Any) -> None:
    good = {"tokens": ["in", "Ulm"], "tags": [0, 1]}
    with pytest.raises(DataError, match=r"row 1 of the given set has .*column 'tokens'"):
        encode_dataset([good, {**good, "tokens": words}], tokenizer(), task="token-classification")
    assert len(encode_dataset([good, good], tokenizer(), task="token-classification")) == 2


@pytest.mark.parametrize("column", ["alternate", "paraphrased_answer", "paraphrased_question"])
def test_optional_texts_may_be_missing_and_nothing_else(column: str) -> None:
    row = {"question": QUESTION, "answer": ANSWER, "perturbed_answer": ["in Bonn"]}
    assert encode_dataset([{**row, column: None}], tokenizer()) == encode_dataset([row], tokenizer())
    for value in (float("nan"), 4):
        with pytest.raises(DataError, match="row 0 of the given set has"):
            encode_dataset([{**row, column: value}], tokenizer())


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"text": QUESTION, "sentence2": ANSWER}, "sentence2"),
        ({"question": QUESTION, "sentence": ANSWER, "text": "in"}, "text"),
        ({"sentence": QUESTION, "premise": ANSWER}, "premise"),
    ],
)
def test_a_text_that_would_not_be_read_is_an_error(row: Any, unread: str) -> None:
    with pytest.raises(DataError, match=f"{unread}, which would not be read"):
        encode_dataset([{**row, "label": 0}], tokenizer(), task="text-classification")


@pytest.mark.parametrize("task", ["language-model", "seq2seq"])
def test_a_question_with_a_context_is_an_error(task: Task) -> None:
    row = {"question": QUESTION, "answer": ANSWER}
    assert encode_dataset([{**row, "id": "7"}], tokenizer(), task=task) == encode_dataset([row], tokenizer(), task=task)
    with pytest.raises(DataError, match="context, which would not be read"):
        encode_dataset([{**row, "context": "in"}], tokenizer(), task=task)


@pytest.mark.parametrize(
    "names",
    [
        ("question", "sentence"),
        ("text", "text_pair"),
        ("question1", "question2"),
        ("premise", "hypothesis"),
        ("sentence1", "sentence2"),
        ("text1", "text2"),
    ],
)
def test_both_parts_of_a_pair_are_read(names: tuple[str, str]) -> None:
    row = {names[0]: "where", names[1]: "Ulm", "label": 1}
    (encoded,) = encode_dataset([row], tokenizer(), task="text-classification")
    assert tokenizer().decode(encoded["input_ids"]) == "where Ulm"


def test_rows_that_are_cut_are_counted_and_warned_of() -> None:
    short, long = {"text": "in Ulm"}, {"text": " ".join(["in"] * 20)}
    for task, extra, row_length in (("language-model", {}, 21), ("text-classification", {"label": 0}, 20)):
        rows = [row | extra for row in (short, long, long)]
        with pytest.warns(UserWarning, match="2 of 3 rows of the forget set are cut at 8 tokens"):
            encoded = encode_dataset(rows, tokenizer(), what="forget", max_length=8, task=task)  # type: ignore[call-overload]
        assert (encoded.left_out.rows, encoded.left_out.tokens) == (2, 2 * (row_length - 8))
        whole = encode_dataset(rows, tokenizer(), what="forget", max_length=row_length, task=task)  # type: ignore[call-overload]
        assert (whole.left_out.rows, whole.left_out.tokens) == (0, 0)


def test_a_source_and_a_target_that_are_cut_are_one_row() -> None:
    row = {"source": " ".join(["in"] * 20), "target": " ".join(["Ulm"] * 12)}
    with pytest.warns(UserWarning, match="1 of 1 rows"):
        encoded = encode_dataset([row], tokenizer(), max_length=10, task="seq2seq")
    assert (encoded.left_out.rows, encoded.left_out.tokens) == (1, 12)  # type: ignore[attr-defined]
