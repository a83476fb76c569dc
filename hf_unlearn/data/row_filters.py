"""Selecting rows of a split: by a filter, by their numbers in a file, or by a file of requests.

A filter is one or more comparisons joined by `and`. It is parsed, never executed as code:

    author == "Basil Mahfouz Al-Kuwaiti" and year >= 1950
    author in ["A", "B"]
    question contains "Kuwait"

The left side is a column; the right side is JSON (a text in double quotes, a number, true, false, null, or a list).
"""

import json
import operator
import re
from pathlib import Path
from typing import Any, TypeAlias

from hf_unlearn.data.formats import Row, Rows
from hf_unlearn.errors import DataError

_OPERATORS = {
    "==": operator.eq,
    "!=": operator.ne,
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "in": lambda left, right: left in right,
    "contains": lambda left, right: right in left,
}
_COLUMN = re.compile(r"\s*([\w.-]+)\s*")
_OPERATOR = re.compile(r"(==|!=|<=|>=|<|>|in\b|contains\b)\s*")
_AND = re.compile(r"\s+and\s+")
Comparison: TypeAlias = tuple[str, str, Any]
"""Column, operator and value."""


def rows_where(rows: Rows, expression: str, what: str = "forget") -> list[int]:
    """Return the numbers of the rows that a filter selects.

    >>> rows_where([{"year": 1950}, {"year": 1960}], "year >= 1955")
    [1]

    Raises:
        DataError: The filter is malformed, names an unknown column, compares values of different types, or selects no
            row.
    """
    comparisons = _parse(expression)
    columns = set(rows[0])
    for column, *_ in comparisons:
        if column not in columns:
            raise DataError(
                f"filter {expression!r}: unknown column {column!r}; use one of {', '.join(sorted(columns))}"
            )
    numbers = [i for i in range(len(rows)) if all(_holds(rows[i], test, expression) for test in comparisons)]
    if not numbers:
        raise DataError(f"filter {expression!r} selects none of the {len(rows)} rows of the {what} set")
    return numbers


def _parse(expression: str) -> list[Comparison]:
    comparisons: list[Comparison] = []
    at = 0
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
                f"filter {expression!r}: the value at character {sign.end()} is not JSON; put texts in double quotes"
            ) from None
        if sign[1] == "in" and not isinstance(value, list):
            raise DataError(f'filter {expression!r}: in needs a list, such as ["a", "b"]')
        comparisons.append((column[1], sign[1], value))
        if not expression[at:].strip():
            return comparisons
        joined = _AND.match(expression, at)
        if joined is None:
            raise DataError(f"filter {expression!r} is malformed at character {at}; comparisons are joined by and")
        at = joined.end()


def _holds(row: Row, comparison: Comparison, expression: str) -> bool:
    """Return whether a comparison is true of a row; raise `DataError` if the two sides cannot be compared."""
    column, sign, right = comparison
    left = row[column]
    if sign == "contains" and left is None:
        return False
    if sign == "contains":
        comparable = isinstance(left, list) or (isinstance(left, str) and isinstance(right, str))
    else:
        may_be_missing = sign in ("==", "!=", "in")
        comparable = all(
            _comparable_type(left) == _comparable_type(value) or (may_be_missing and None in (left, value))
            for value in (right if sign == "in" else [right])
        )
    if not comparable:  # a text never equals a number: the filter would silently select nothing, or everything
        raise DataError(
            f"filter {expression!r}: column {column!r} holds {left!r}, which {sign} cannot compare to {right!r}"
        )
    return bool(_OPERATORS[sign](left, right))


def _comparable_type(value: object) -> type:
    """Return one type for all numbers, which are comparable; true and false are not numbers here."""
    return float if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value)


def _same(left: object, right: object) -> bool:
    return _comparable_type(left) == _comparable_type(right) and left == right


def rows_by_index(rows: Rows, path: str, what: str = "forget") -> list[int]:
    """Return row numbers from a file: a JSON list, or one number per line.

    Raises:
        DataError: The file is missing, holds something that is not a number, or no number; a number is out of range or
            occurs twice.
    """
    text = _read(path)
    try:
        numbers = json.loads(text) if text.lstrip().startswith("[") else [int(line) for line in text.split()]
    except ValueError as error:
        raise DataError(f"{path} is neither a JSON list of row numbers nor one number a line: {error}") from error
    seen: set[int] = set()
    for index in numbers:
        if not isinstance(index, int) or isinstance(index, bool):
            raise DataError(f"{path} holds {index!r}; row numbers are whole numbers from 0")
        if not 0 <= index < len(rows):
            raise DataError(f"{path} names row {index}, the {what} set has rows 0 to {len(rows) - 1}")
        if index in seen:
            raise DataError(f"{path} names row {index} twice")
        seen.add(index)
    if not numbers:
        raise DataError(f"{path} names no row")
    return numbers


def read_requests(path: str) -> list[dict[str, Any]]:
    """Return the lines of a file of requests, each a JSON object.

    Raises:
        DataError: The file is missing or has no line, or a line is not a JSON object.
    """
    lines = [(n, line) for n, line in enumerate(_read(path).splitlines(), 1) if line.strip()]
    requests = []
    for number, line in lines:
        try:
            request = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number} is not JSON: {error}") from error
        if not isinstance(request, dict) or not request:
            raise DataError(f'{path}, line {number} must be an object, such as {{"id": 7}} or a whole row')
        requests.append(request)
    if not requests:
        raise DataError(f"{path} has no line")
    return requests


def rows_requested(rows: Rows, path: str, what: str = "forget") -> list[int]:
    """Return the numbers of the rows that a file of requests names, one JSON object per line.

    A line names every row that has all of its values: a complete row names itself, `{"author": 7}` names all rows of
    author 7.

    Raises:
        DataError: As `read_requests`; a line has an unknown column or fits no row, or two lines name the same row.
    """
    request_of: dict[int, int] = {}
    columns = set(rows[0])
    all_rows = [rows[i] for i in range(len(rows))]
    for number, request in enumerate(read_requests(path), 1):
        if unknown := sorted(set(request) - columns):
            raise DataError(
                f"{path}, request {number}: unknown column {unknown[0]!r}; use one of {', '.join(sorted(columns))}"
            )
        fits = [i for i, row in enumerate(all_rows) if all(_same(row[name], value) for name, value in request.items())]
        if not fits:
            raise DataError(f"{path}, request {number} fits none of the {len(rows)} rows of the {what} set")
        for index in fits:
            if index in request_of:
                first = request_of[index]
                raise DataError(f"{path}, requests {first} and {number} both name row {index}; name it once")
            request_of[index] = number
    return sorted(request_of)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
