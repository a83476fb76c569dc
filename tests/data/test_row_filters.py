"""Laws of selecting rows: a filter is its plain Python twin and never code; files name rows once; what cannot be meant
is an error, never another set of rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from hf_unlearn.data.row_filters import rows_by_index, rows_requested, rows_where
from hf_unlearn.errors import DataError

ROWS = [
    {
        "id": i,
        "author": name,
        "year": 1950 + 10 * i,
        "tags": ["a"] if i % 2 else ["b", "c"],
        "note": None if i else "x and y",
    }
    for i, name in enumerate(["Basil", "Nikolai", "Basil", 'Ann "Q" in Ulm', "Rose"])
]
COLUMNS = "author, id, note, tags, year"


@pytest.mark.parametrize(
    ("expression", "twin"),
    [
        ('author == "Basil"', lambda r: r["author"] == "Basil"),
        ('author != "Basil"', lambda r: r["author"] != "Basil"),
        ('author in ["Basil", "Rose"]', lambda r: r["author"] in ("Basil", "Rose")),
        ('author contains "as"', lambda r: "as" in r["author"]),
        ('author == "Ann \\"Q\\" in Ulm"', lambda r: r["id"] == 3),
        ("year >= 1970 and year<1990", lambda r: 1970 <= r["year"] < 1990),
        ("year == 1970.0", lambda r: r["id"] == 2),
        ('author=="Basil" and id > 0', lambda r: r["id"] == 2),
        ('tags contains "c"', lambda r: "c" in r["tags"]),
        ("note == null", lambda r: r["note"] is None),
        ('note == "x and y"', lambda r: r["id"] == 0),
        ('note contains "and"', lambda r: r["id"] == 0),
    ],
)
def test_a_filter_selects_what_its_twin_does(expression: str, twin: Callable[[dict[str, Any]], bool]) -> None:
    expected = [i for i, row in enumerate(ROWS) if twin(row)]
    assert rows_where(ROWS, expression) == expected and 0 < len(expected) < len(ROWS)
    assert rows_where(datasets.Dataset.from_list(ROWS), expression) == expected


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ('writer == "Basil"', f"unknown column 'writer'; use one of {COLUMNS}"),
        ('author == "Nobody"', "selects none of the 5 rows of the forget set"),
        ("author == Basil", "the value at character 10 is not JSON; put texts in double quotes"),
        ("author", "is malformed at character 0; write column OPERATOR value"),
        ("", "is malformed at character 0"),
        ('author = "Basil"', "is malformed at character 0"),
        ('author == "Basil" or id == 1', "is malformed at character 17; comparisons are joined by and"),
        ('author == "Basil" and', "comparisons are joined by and"),
        ('author in "Basil"', "in needs a list"),
        ('year == "1950"', "column 'year' holds 1950, which == cannot compare to '1950'"),
        ('year != "1950"', "which != cannot compare"),
        ("author < 3", "which < cannot compare"),
        ("year contains 1", "which contains cannot compare"),
        ("note < 3", "which < cannot compare"),
        ("id == true", "which == cannot compare to True"),
        ('__import__("os").system("true") == 0', "is malformed at character 0"),
        ('id == 0 and id.__class__ == "int"', "unknown column 'id.__class__'"),
    ],
)
def test_a_filter_that_cannot_be_meant_is_an_error(expression: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        rows_where(ROWS, expression)
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["[4, 0, 2]", "4\n0\n2\n", " [ 4,\n0,\n2 ] "])
def test_row_numbers_come_from_a_json_list_or_lines(text: str, tmp_path: Path) -> None:
    (tmp_path / "rows").write_text(text)
    assert rows_by_index(ROWS, str(tmp_path / "rows")) == [4, 0, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[0, 5]", "names row 5, the forget set has rows 0 to 4"),
        ("-1", "names row -1"),
        ("[1, 2, 1]", "names row 1 twice"),
        ("[1, 2.5]", "holds 2.5; row numbers are whole numbers"),
        ("[true]", "holds True"),
        ("1\ntwo", "neither a JSON list of row numbers nor one number a line"),
        ("[1, 2", "neither a JSON list"),
        ("", "names no row"),
        ("[]", "names no row"),
    ],
)
def test_wrong_row_numbers_are_errors(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "rows").write_text(text)
    with pytest.raises(DataError) as caught:
        rows_by_index(ROWS, str(tmp_path / "rows"))
    assert message in str(caught.value)
    with pytest.raises(DataError, match="cannot read"):
        rows_by_index(ROWS, str(tmp_path / "nothing"))


def requested(tmp_path: Path, *lines: Any) -> list[int]:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (tmp_path / "requests.jsonl").write_text(text)
    return rows_requested(ROWS, str(tmp_path / "requests.jsonl"))


def test_a_request_names_rows_whole_or_by_some_of_their_values(tmp_path: Path) -> None:
    assert requested(tmp_path, ROWS[3]) == [3]
    assert requested(tmp_path, {"id": 4}, "", {"author": "Basil"}) == [0, 2, 4]
    assert requested(tmp_path, {"author": "Basil", "year": 1970}) == [2]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"id": 9}], "request 1 fits none of the 5 rows of the forget set"),
        ([{"id": "0"}], "fits none"),
        ([{"id": True}], "fits none"),
        ([{**ROWS[3], "year": 1}], "fits none"),
        ([{"number": 1}], f"unknown column 'number'; use one of {COLUMNS}"),
        ([{"id": 0}, {"author": "Basil"}], "requests 1 and 2 both name row 0; name it once"),
        (["{not json"], "line 1 is not JSON"),
        (["[1]"], "line 1 must be an object"),
        (["{}"], "line 1 must be an object"),
        ([""], "has no line"),
    ],
)
def test_wrong_requests_are_errors(lines: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        requested(tmp_path, *lines)
    assert message in str(caught.value)
