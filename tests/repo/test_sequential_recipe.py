"""Laws of the experiment with a series of requests.

It ends with a table and a picture of every arm, resumes after a kill, and does nothing twice. The models are small and
hardly trained: what they forget is tested elsewhere.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from helpers.paths import RECIPES
from helpers.tiny import requires_asset, sharpen
from hf_unlearn.deletion.ledger import Ledger
from hf_unlearn.evaluation.report import UnlearningReport

RECIPE = RECIPES / "experiments" / "sequential.py"


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    from transformers import ViTConfig, ViTForImageClassification

    spec = importlib.util.spec_from_file_location("sequential", RECIPE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    plain = module.digits_requests

    def small(rows: Any, seed: int, scratch: str) -> Any:
        config = ViTConfig(
            image_size=8,
            patch_size=4,
            num_channels=1,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            num_labels=10,
        )
        return sharpen(ViTForImageClassification(config))

    def few(count: int, seed: int, classes: bool) -> Any:
        forget, remaining, holdout = plain(count, seed, classes)
        return [rows[:6] for rows in forget], remaining[:40], holdout[:20]

    monkeypatch.setattr(module.digits_demo, "train_vit", small)
    monkeypatch.setattr(module, "digits_requests", few)
    monkeypatch.setattr("hf_unlearn.publishing.model_folder.save_plots", lambda report, folder: [])
    return module


def start(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, *argv: object) -> int:
    monkeypatch.setattr(sys, "argv", ["sequential.py", *map(str, argv)])
    return recipe.main()


@pytest.mark.parametrize("forget", [pytest.param("rows", marks=pytest.mark.slow), "classes"])
def test_it_ends_with_a_table_of_every_arm(
    forget: str, recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("digits", "--forget", forget, "--requests", 2, "--output_dir", tmp_path / "out")
    assert start(recipe, monkeypatch, *argv) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in table[2:]] == [
        "original",
        "carried",
        "again",
        "fresh",
        "joint",
        "retrained",
    ]
    assert len({line.count("|") for line in table}) == 1
    assert (tmp_path / "out" / "series.png").read_bytes().startswith(b"\x89PNG")
    for arm, carried in (("carried", True), ("again", True), ("fresh", False)):
        ledger = Ledger(tmp_path / "out" / arm / "ledger", recipe.read_key(tmp_path / "out" / "ledger.key"))
        assert ledger.verify().intact
        first, second = ledger.requests()
        assert second.content["weights"]["before"] == first.content["weights"]["after"]
        assert bool(second.content["series"]["statistics_carried_from"]) == carried
        assert {m["split"] for m in second.content["metrics"]} >= {"forgotten_1", "forget", "retain", "holdout"}
    assert start(recipe, monkeypatch, "table", tmp_path / "out") == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")] == table


def test_a_killed_run_resumes_and_does_nothing_twice(
    recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fulfilled: list[str] = []
    plain = recipe.fulfil_request

    def fulfil(request: Any, args: Any) -> Any:
        if len(fulfilled) == 2:
            raise KeyboardInterrupt
        fulfilled.append(Path(args.output_dir).parent.name + Path(args.output_dir).name)
        return plain(request, args)

    argv = ("digits", "--requests", 2, "--output_dir", tmp_path / "out")
    monkeypatch.setattr(recipe, "fulfil_request", fulfil)
    with pytest.raises(KeyboardInterrupt):
        start(recipe, monkeypatch, *argv)
    fulfilled[:] = ["two", "before", *fulfilled]
    assert start(recipe, monkeypatch, *argv) == 0 and start(recipe, monkeypatch, *argv) == 0
    assert fulfilled[2:] == ["carried01", "carried02", "again01", "again02", "fresh01", "fresh02", "joint01"]


def test_no_two_requests_share_a_row() -> None:
    spec = importlib.util.spec_from_file_location("sequential_plain", RECIPE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for count, classes in ((10, False), (5, True)):
        forget, remaining, holdout = module.digits_requests(count, 0, classes)
        keys = [row["pixel_values"].tobytes() for rows in (*forget, remaining) for row in rows]
        assert len(forget) == count and len(keys) == 1437
        if classes:
            assert [{row["labels"] for row in rows} for rows in forget] == [{c} for c in range(5)]
            assert {row["labels"] for row in remaining} == {row["labels"] for row in holdout} == {5, 6, 7, 8, 9}
        else:
            assert {len(rows) for rows in forget} == {14}


@pytest.mark.slow
def test_authors_are_forgotten_one_after_another_by_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = requires_asset("stories260K"), requires_asset("tofu/full.json").parent
    spec = importlib.util.spec_from_file_location("sequential_tofu", RECIPE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    few = ["--fine_tune_epochs", 1, "--max_length", 128, "--max_steps", 1, "--use_cpu", "True", "--eval_splits", ""]
    few += ["--model_name_or_path", model, "--dataset_name", data, "--cache_dir", tmp_path / "cache"]
    argv = ["tofu", "--requests", 2, "--output_dir", tmp_path / "out", *few]
    for _ in range(2):  # the second time everything exists
        assert start(module, monkeypatch, *argv) == 0
    table = [line.split("|")[1:3] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [cells[0].strip() for cells in table[2:8]] == ["original", "carried", "again", "fresh", "joint", "retrained"]
    assert table[8:] == table[:8]
    for arm, carried in (("carried", 1), ("again", 1), ("fresh", 0)):
        last = UnlearningReport.load(tmp_path / "out" / arm / "02")
        assert len(last.series["statistics_carried_from"]) == carried
        assert last.method["rows_forgotten_again"] == (20 if arm == "again" else 0)
        assert last.get("answer_probability", "forgotten_1").n == 20  # type: ignore[union-attr]
        assert not list((tmp_path / "out" / arm / "01").glob("*.safetensors"))
