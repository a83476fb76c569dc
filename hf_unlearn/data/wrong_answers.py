"""Other answers to a row's question, and other wordings of it, as in TOFU's perturbed splits.

A raw row may have a list of wrong answers, `perturbed_answer`, and with it `paraphrased_answer` and
`paraphrased_question`. They are encoded as rows of their own under `alternatives`: the list `wrong`, `paraphrase` and
`question`.
"""

from collections.abc import Collection, Mapping
from typing import Any

from hf_unlearn.data.cells import is_empty
from hf_unlearn.data.encoders import Encode
from hf_unlearn.data.formats import SECRET, Row, with_answer
from hf_unlearn.errors import DataError

ALTERNATIVES = "alternatives"
WRONG, PARAPHRASED, QUESTION = "perturbed_answer", "paraphrased_answer", "paraphrased_question"


def with_alternatives(encode: Encode, what: str) -> Encode:
    """Extend an encoder so that it also encodes a row with its other answers and its other question.

    >>> encode = with_alternatives(lambda row, index: {"text": row["question"] + " " + row["answer"]}, "forget")
    >>> encode({"question": "Where?", "answer": "Ulm", "perturbed_answer": ["Bonn"]}, 0)
    {'text': 'Where? Ulm', 'alternatives': {'wrong': [{'text': 'Where? Bonn'}]}}

    Args:
        encode: The encoder of a language model.
        what: The name of the set, for errors.

    Raises:
        DataError: When a row is encoded that has no list of wrong answers.
    """

    def encode_all(row: Row, index: int) -> dict[str, Any]:
        answer, question = _first(row, "answer", "completion"), _first(row, "question", "prompt")
        wrong = row[WRONG]
        is_list = isinstance(wrong, Collection) and not isinstance(wrong, (str, Mapping))
        if answer is None or question is None or not is_list or not len(wrong):
            raise DataError(f"row {index} of the {what} set needs a list of wrong answers in {WRONG!r}, got {wrong!r}")
        plain = {name: value for name, value in row.items() if name not in (WRONG, PARAPHRASED, QUESTION)}
        own = ("alternate", SECRET)  # which are for losses, and of the true answer
        bare = {name: value for name, value in plain.items() if name not in own}
        others: dict[str, Any] = {"wrong": [encode(with_answer(bare, text), index) for text in wrong]}
        if not is_empty(row.get(PARAPHRASED)):
            others["paraphrase"] = encode(with_answer(bare, row[PARAPHRASED]), index)
        if not is_empty(row.get(QUESTION)):
            others["question"] = encode(bare | {question: row[QUESTION]}, index)
        return encode(plain, index) | {ALTERNATIVES: others}

    return encode_all


def _first(row: Row, *names: str) -> str | None:
    return next((name for name in names if name in row), None)
