"""Laws of the title of a table: it names the data that the grid was run on."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_unlearn.benchmark.cell import Cell
from hf_unlearn.benchmark.grid import Results
from hf_unlearn.benchmark.registry import BENCHMARKS
from hf_unlearn.benchmark.results import markdown
from hf_unlearn.deletion.arguments import BenchmarkArguments
from hf_unlearn.trainer.config import UnlearningConfig


def first_line(name: str, folder: Path, **changes: str) -> tuple[str, bool]:
    """Return the title of a grid with one cell, and whether published numbers are said to be of other rows."""
    benchmark = BENCHMARKS[name]
    fields = BenchmarkArguments.__dataclass_fields__
    args = BenchmarkArguments(**{key: value for key, value in benchmark.defaults.items() if key in fields} | changes)
    cell = Cell("npo", "none", 0, args, UnlearningConfig(str(folder), use_cpu=True))
    text = markdown(name, benchmark, Results({}, {cell: "it failed"}), "hf-unlearn benchmark")
    return text.splitlines()[0], "published numbers are of other rows" in text


@pytest.mark.parametrize("name", ["images", "text", "tofu", "muse", "wmdp"])
def test_the_title_names_other_data_and_its_own_only_for_its_own(name: str, tmp_path: Path) -> None:
    about, published = BENCHMARKS[name].about, bool(BENCHMARKS[name].published)
    assert first_line(name, tmp_path) == (f"# {name}: {about}", False)
    (tmp_path / "letters").mkdir()
    others = {"dataset_name": str(tmp_path / "letters"), "train": "full", "forget": "full[0:5]"}
    title, shown = first_line(name, tmp_path, **others)
    assert title.startswith(f"# {name}: letters (full[0:5] of full), ") and about not in title and shown == published
    assert str(tmp_path) not in title
    assert about not in first_line(name, tmp_path, model_name_or_path="another/model")[0]
    assert first_line(name, tmp_path, train="train[0:9]")[0] != f"# {name}: {about}"
