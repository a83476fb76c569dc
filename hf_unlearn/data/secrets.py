"""The secrets of a raw row: the texts in its answer that carry what is to be forgotten, named by the user.

Without them, what carries it is guessed (`evaluation.content`).
"""

import re
from collections.abc import Sequence

import numpy as np

from hf_unlearn.data.cells import checked_text, is_empty
from hf_unlearn.data.formats import SECRET, Row
from hf_unlearn.data.tokens import Span
from hf_unlearn.errors import DataError


def secrets_of(row: Row, where: str) -> list[str]:
    """Return the texts in the column `secret` of a raw row, or an empty list if it has none.

    >>> secrets_of({"answer": "In Ulm.", "secret": "Ulm"}, "row 0 of the forget set")
    ['Ulm']

    Raises:
        DataError: The column is neither a text nor a list of texts, or a text is empty.
    """
    value = row.get(SECRET)
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if is_empty(value):
        return []
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)):
        raise DataError(
            f"{where} has {value!r:.60} in column {SECRET!r}; give a text of its answer, or a list of texts"
        )
    secrets = [checked_text(text, f"column {SECRET!r}", where).strip() for text in texts]
    if not all(secrets):
        raise DataError(
            f"{where} has an empty text in column {SECRET!r}; name what is to be forgotten, or leave it out"
        )
    return secrets


def secret_spans(text: str, answers: Sequence[Span], secrets: Sequence[str], where: str) -> list[Span]:
    """Return where the answers in a text have the secrets: every occurrence of each.

    >>> secret_spans("Where? In Ulm, in Ulm.", [(7, 22)], ["Ulm"], "row 0 of the forget set")
    [(10, 13), (18, 21)]

    Raises:
        DataError: A secret occurs in no answer.
    """
    spans = []
    for secret in secrets:
        found = [
            (start + match.start(), start + match.start() + len(secret))
            for start, end in answers
            for match in re.finditer(f"(?={re.escape(secret)})", text[start:end])  # also those that overlap
        ]
        if not found:
            raise DataError(
                f"{where} has a {SECRET} that does not occur in its answer: {secret!r:.60}; copy it from the answer, "
                "with the same letters and spaces"
            )
        spans += found
    return sorted(spans)
