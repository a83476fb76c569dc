"""Which rows of a split are meant: by a filter, by their numbers in a file, or by a file of requests.

A filter is one or more comparisons joined by `and`; nothing of it is executed:

    author == "Basil Mahfouz Al-Kuwaiti" and year >= 1950
    author in ["A", "B"]
    question contains "Kuwait"

The left side is a column, the right side JSON (a text in double quotes, a number, true, false, null, or a list).
"""

import json
import operator
import re
from pathlib import Path
from typing import Any

from hf_unlearn.data.formats import Row
from hf_unlearn.errors import DataError

_OPERATORS = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "in": lambda value, given: value in given,
    "contains": lambda value, given: given in value,
}
_COLUMN = re.compile(r"\s*([\w.-]+)\s*")
_OPERATOR = re.compile(r"(==|!=|<=|>=|<|>|in\b|contains\b)\s*")
_AND = re.compile(r"\s+and\s+")


def rows_where(rows: Any, expression: str, what: str = "forget") -> list[int]:
    """Numbers of the rows that a filter selects.

    Raises:
        DataError: A malformed filter, an unknown column, a comparison of values of different types, or no row.
    """
    tests = _parse(expression)
    columns = set(rows[0])
    for column, *_ in tests:
        if column not in columns:
            raise DataError(f"filter {expression!r}: there is no column {column!r}, only {', '.join(sorted(columns))}")
    found = [i for i in range(len(rows)) if all(_holds(rows[i], test, expression) for test in tests)]
    if not found:
        raise DataError(f"filter {expression!r} selects none of the {len(rows)} rows of the {what} set")
    return found


def _parse(expression: str) -> list[tuple[str, str, Any]]:
    """(column, operator, value) of each comparison."""
    tests, at = [], 0
    while True:
        column = _COLUMN.match(expression, at)
        sign = _OPERATOR.match(expression, column.end()) if column else None
        if column is None or sign is None:
            raise DataError(
                f"filter {expression!r} is malformed at character {at}; write column OPERATOR value, with "
                f"{', '.join(_OPERATORS)}, joined by and"
            )
        try:
            value, at = json.JSONDecoder().raw_decode(expression, sign.end())
        except ValueError:
            raise DataError(
                f"filter {expression!r}: the value at character {sign.end()} is no JSON; write texts in double quotes"
            ) from None
        if sign[1] == "in" and not isinstance(value, list):
            raise DataError(f'filter {expression!r}: in needs a list, such as ["a", "b"]')
        tests.append((column[1], sign[1], value))
        if not expression[at:].strip():
            return tests
        joined = _AND.match(expression, at)
        if joined is None:
            raise DataError(f"filter {expression!r} is malformed at character {at}; comparisons are joined by and")
        at = joined.end()


def _holds(row: Row, test: tuple[str, str, Any], expression: str) -> bool:
    column, sign, given = test
    value = row[column]
    if sign == "contains" and value is None:
        return False
    wanted = given if sign == "in" else [given]
    if sign == "contains":
        fits = isinstance(value, list) or (isinstance(value, str) and isinstance(given, str))
    else:
        fits = all(
            _kind(value) == _kind(one) or (None in (value, one) and sign in ("==", "!=", "in")) for one in wanted
        )
    if not fits:  # a text is never equal to a number: the filter would silently select nothing, or everything
        raise DataError(
            f"filter {expression!r}: column {column!r} holds {value!r}, which {sign} cannot compare to {given!r}"
        )
    return bool(_OPERATORS[sign](value, given))


def _kind(value: Any) -> type:
    """Numbers of all kinds are comparable; truth values are no numbers here."""
    return float if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value)


def _same(value: Any, given: Any) -> bool:
    return _kind(value) == _kind(given) and value == given


def rows_by_index(rows: Any, path: str, what: str = "forget") -> list[int]:
    """Numbers of rows from a file: a JSON list, or one number a line.

    Raises:
        DataError: No such file, something that is no number, a number twice or out of range, or none.
    """
    text = _read(path)
    try:
        found = json.loads(text) if text.lstrip().startswith("[") else [int(line) for line in text.split()]
    except ValueError as error:
        raise DataError(f"{path} is neither a JSON list of row numbers nor one number a line: {error}") from error
    seen: set[int] = set()
    for index in found:
        if not isinstance(index, int) or isinstance(index, bool):
            raise DataError(f"{path} holds {index!r}; row numbers are whole numbers from 0")
        if not 0 <= index < len(rows):
            raise DataError(f"{path} names row {index}, the {what} set has rows 0 to {len(rows) - 1}")
        if index in seen:
            raise DataError(f"{path} names row {index} twice")
        seen.add(index)
    if not found:
        raise DataError(f"{path} names no row")
    return found


def read_requests(path: str) -> list[dict[str, Any]]:
    """The lines of a file of requests, each a JSON object.

    Raises:
        DataError: No such file, a line that is no JSON object, or none.
    """
    lines = [(n, line) for n, line in enumerate(_read(path).splitlines(), 1) if line.strip()]
    requests = []
    for number, line in lines:
        try:
            request = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number} is no JSON: {error}") from error
        if not isinstance(request, dict) or not request:
            raise DataError(f'{path}, line {number} must be an object, such as {{"id": 7}} or a whole row')
        requests.append(request)
    if not requests:
        raise DataError(f"{path} has no line")
    return requests


def rows_requested(rows: Any, path: str, what: str = "forget") -> list[int]:
    """Numbers of the rows that a file of requests names, one JSON object a line.

    A line names every row that has all of its values: a whole row names itself, `{"author": 7}` all rows of author 7.

    Raises:
        DataError: As `read_requests`; an unknown column, a line that no row fits, or a row that two lines name.
    """
    found: dict[int, int] = {}
    columns = set(rows[0])
    all_rows = [rows[i] for i in range(len(rows))]
    for number, request in enumerate(read_requests(path), 1):
        if unknown := sorted(set(request) - columns):
            raise DataError(
                f"{path}, request {number}: there is no column {unknown[0]!r}, only {', '.join(sorted(columns))}"
            )
        fits = [i for i, row in enumerate(all_rows) if all(_same(row[name], value) for name, value in request.items())]
        if not fits:
            raise DataError(f"{path}, request {number} fits none of the {len(rows)} rows of the {what} set")
        for index in fits:
            if index in found:
                raise DataError(f"{path}, requests {found[index]} and {number} both name row {index}; name it once")
            found[index] = number
    return sorted(found)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
