"""Habits that a program can check: no formatting exceptions, few `Any`, plain words."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.paths import ROOT

SOURCES = sorted(p for folder in ("hf_unlearn", "tests", "recipes") for p in (ROOT / folder).rglob("*.py"))
DOCUMENTS = [
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "recipes").rglob("*.md")),
    *sorted(ROOT.glob("*.md")),
]
TRANSLATED = re.compile(
    r"(?<![Tt]here )(?<!where )\bis no (?!(?:longer|more|less|better|worse|different)\b)|\banew\b|\bat hand\b"
    r"|\bof the moment\b|\bare told\b|\bis told\b|\btells of\b|\bwhat it does is\b"
)
"""Phrases that read as translated; say "is not a", "again", "available", "current", "reports"."""


def annotations_in(tree: ast.AST) -> Iterator[ast.expr]:
    """Every annotation of an argument, a return value or a variable."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.returns is not None:
            yield node.returns
        if isinstance(node, ast.arg) and node.annotation is not None:
            yield node.annotation
        if isinstance(node, ast.AnnAssign):
            yield node.annotation


def has_any(annotation: ast.expr) -> bool:
    """Whether `Any` stands anywhere in an annotation, as in `dict[str, Any]`."""
    return any(isinstance(node, ast.Name) and node.id == "Any" for node in ast.walk(annotation))


def share_of_any(sources: list[str]) -> float:
    annotations = [annotation for source in sources for annotation in annotations_in(ast.parse(source))]
    return sum(map(has_any, annotations)) / len(annotations)


def test_less_than_five_percent_of_annotations_have_any() -> None:
    share = share_of_any([p.read_text(encoding="utf-8") for p in (ROOT / "hf_unlearn").rglob("*.py")])
    assert share < 0.05, f"{share:.1%} of the annotations in the package have Any"


def test_the_count_of_any_sees_arguments_returns_and_variables() -> None:
    source = "x: Any = 1\ndef f(a: Any, b: dict[str, Any], c: int) -> Any | None:\n    y: int = 2"
    assert share_of_any([source]) == 4 / 6


def test_no_formatting_exceptions() -> None:
    skipped = [str(p.relative_to(ROOT)) for p in SOURCES if "# fmt: " + "skip" in p.read_text(encoding="utf-8")]
    assert skipped == []


def prose_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line numbers and lines of a document; of a module its docstrings, strings and comments are lines as well."""
    yield from enumerate(path.read_text(encoding="utf-8").splitlines(), 1)


def test_no_phrase_reads_as_translated() -> None:
    odd = [
        f"{path.relative_to(ROOT)}:{number}: {match[0]!r}"
        for path in (*SOURCES, *DOCUMENTS)
        if path != Path(__file__)
        for number, line in prose_of(path)
        if (match := TRANSLATED.search(line))
    ]
    assert odd == [], "\n" + "\n".join(odd)


@pytest.mark.parametrize("line", ["it is no beginning of a ledger", "made anew", "rows at hand", "users are told"])
def test_the_search_finds_translated_phrases(line: str) -> None:
    assert TRANSLATED.search(line)


@pytest.mark.parametrize(
    "line", ["which is no longer true", "there is no folder", "is not a valid first entry", "rows that are available"]
)
def test_the_search_lets_plain_sentences_pass(line: str) -> None:
    assert not TRANSLATED.search(line)
