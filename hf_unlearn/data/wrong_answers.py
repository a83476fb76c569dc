"""Other answers to a question, and other questions, beside a row's own: TOFU's perturbed splits.

A raw row may have a list of wrong answers, `perturbed_answer`, and with it `paraphrased_answer` and
`paraphrased_question`. Encoded they lie in the row under `alternatives`, each as a row of its own: the list `wrong`,
`paraphrase` and `question`.
"""

from collections.abc import Mapping
from typing import Any

from hf_unlearn.data.formats import Encode, with_answer
from hf_unlearn.errors import DataError

ALTERNATIVES = "alternatives"
WRONG, PARAPHRASED, QUESTION = "perturbed_answer", "paraphrased_answer", "paraphrased_question"


def with_alternatives(encode: Encode, what: str) -> Encode:
    """`encode` of a raw row and its index, which also encodes the row with its other answers and question.

    Raises:
        DataError: A row without a list of wrong answers; `what` names its set.
    """

    def encode_all(row: Mapping[str, Any], index: int) -> dict[str, Any]:
        answer, question = _first(row, "answer", "completion"), _first(row, "question", "prompt")
        wrong = row[WRONG]
        if answer is None or question is None or isinstance(wrong, str) or not wrong:
            raise DataError(f"row {index} of the {what} set needs a list of wrong answers in {WRONG!r}, got {wrong!r}")
        plain = {name: value for name, value in row.items() if name not in (WRONG, PARAPHRASED, QUESTION)}
        bare = {name: value for name, value in plain.items() if name != "alternate"}  # a loss's, of the row itself
        others: dict[str, Any] = {"wrong": [encode(with_answer(bare, text), index) for text in wrong]}
        if row.get(PARAPHRASED):
            others["paraphrase"] = encode(with_answer(bare, row[PARAPHRASED]), index)
        if row.get(QUESTION):
            others["question"] = encode(bare | {question: row[QUESTION]}, index)
        return encode(plain, index) | {ALTERNATIVES: others}

    return encode_all


def _first(row: Mapping[str, Any], *names: str) -> str | None:
    return next((name for name in names if name in row), None)
