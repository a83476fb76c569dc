"""Reading the cells of a raw row: a text that is missing, or is not a text, is an error that names the row."""

import json
from collections.abc import Iterable, Sequence

from hf_unlearn.data.formats import Row
from hf_unlearn.errors import DataError


def text_cell(row: Row, name: str, where: str) -> str:
    """Return the text in the column `name` of a raw row.

    >>> text_cell({"answer": "In Ulm."}, "answer", "row 3 of the forget set")
    'In Ulm.'
    >>> text_cell({"answer": None}, "answer", "row 3 of the forget set")
    Traceback (most recent call last):
        ...
    hf_unlearn.errors.DataError: row 3 of the forget set has None in column 'answer', not a text; fill it in or \
leave the row out

    Raises:
        DataError: The row has no such column, or its value is not a text that can be encoded.
    """
    return checked_text(cell(row, name, where), f"column {name!r}", where)


def cell(row: Row, name: str, where: str) -> object:
    """Return the value in the column `name`; raise `DataError` if the row does not have the column."""
    if name not in row:
        raise DataError(f"{where} has no column {name!r}, only {sorted(row)}; fill it in or leave the row out")
    return row[name]


def checked_text(value: object, place: str, where: str) -> str:
    """Return `value` if it is a text; raise `DataError` with the place in the row if it is not."""
    if not isinstance(value, str):
        remedy = "convert it to a text" if isinstance(value, (int, list)) else "fill it in"
        raise DataError(f"{where} has {value!r:.60} in {place}, not a text; {remedy} or leave the row out")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} has a text in {place} that is not valid Unicode (character {error.start} is half of a surrogate "
            "pair); repair the text or leave the row out"
        ) from error
    return value


def is_empty(value: object) -> bool:
    """Return whether an optional cell has no value: None, or an empty text or list.

    >>> is_empty(None), is_empty(""), is_empty(float("nan"))
    (True, True, False)
    """
    return value is None or (isinstance(value, (str, list, tuple)) and not value)


def answer_cell(row: Row, name: str, where: str) -> str:
    """Return the text in an answer's column; raise `DataError` as `text_cell`, and if the text is empty."""
    text = text_cell(row, name, where)
    if not text.strip():
        raise DataError(f"{where} has no token to predict: its {name} is empty; fill it in or leave the row out")
    return text


def require_some_text(texts: Sequence[str], names: Sequence[str], where: str) -> None:
    """Raise `DataError` if all texts of an input are empty."""
    if not any(text.strip() for text in texts):
        raise DataError(f"{where} has no text in {' and '.join(map(repr, names))}; fill it in or leave the row out")


def listed_cell(row: Row, name: str, where: str) -> list[object]:
    """Return the list in the column `name`, which may be written as JSON; raise `DataError` for other values."""
    value = row[name]
    try:
        parsed = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        parsed = None
    if not isinstance(parsed, (list, tuple)):
        raise DataError(f"{where} has {value!r:.60} in column {name!r}, not a list; give a list, or leave it out")
    return list(parsed)


def word_cells(row: Row, name: str, where: str) -> list[str]:
    """Return the words in the column `name`; raise `DataError` if it is not a list of texts."""
    words = cell(row, name, where)
    if isinstance(words, str) or not isinstance(words, Iterable):
        raise DataError(f"{where} has {words!r:.60} in column {name!r}, not a list of words; fill it in")
    return [checked_text(word, f"word {number} of column {name!r}", where) for number, word in enumerate(words)]
