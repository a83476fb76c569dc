"""Laws of the collection options: one object, the same settings as the keywords of `collect_statistics`."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path

import pytest

from helpers import tiny as cases
from hf_unlearn.errors import SettingsError
from hf_unlearn.statistics.collect import collect_statistics, collect_with_options
from hf_unlearn.statistics.options import CollectionOptions
from hf_unlearn.trainer.config import UnlearningConfig


def test_collect_statistics_takes_every_option_with_the_same_default() -> None:
    keywords = inspect.signature(collect_statistics).parameters
    assert {field.name: field.default for field in fields(CollectionOptions)} == {
        name: keyword.default
        for name, keyword in keywords.items()
        if name not in ("model", "dataset", "collator", "processing_class")
    }


def test_keywords_and_options_collect_the_same() -> None:
    model, rows = cases.tiny_mlp(), cases.vector_rows(5)
    options = CollectionOptions(fisher=True, layers=["second"], max_rows=3, progress=False)
    by_options = collect_with_options(model, rows, options)
    by_keywords = collect_statistics(model, rows, fisher=True, layers=["second"], max_rows=3, progress=False)
    assert by_options.data == by_keywords.data and by_options.settings == by_keywords.settings
    assert by_options.layers == by_keywords.layers and by_options.rows == 3
    assert by_options.data != collect_with_options(model, rows, CollectionOptions(progress=False)).data


def test_a_runs_configuration_makes_options(tmp_path: Path) -> None:
    config = UnlearningConfig(
        str(tmp_path),
        keep_statistics_on="cpu",
        max_memory="1GB",
        sketch_above=100,
        sketch_rank=7,
        per_device_eval_batch_size=5,
        disable_tqdm=True,
        use_cpu=True,
    )
    assert CollectionOptions.from_config(config, fisher=True) == CollectionOptions(
        batch_size=5, fisher=True, keep_on="cpu", max_memory="1GB", sketch_above=100, sketch_rank=7, progress=False
    )


@pytest.mark.parametrize(
    ("settings", "seen"),
    [
        ({"batch_size": 0}, "batch_size and max_rows must be at least 1, got 0 and None"),
        ({"keep_on": "tape"}, "not 'tape'"),
        ({"max_memory": "much"}, "max_memory must be a size such as '4GB', got 'much'"),
        ({"sketch_rank": 0}, "sketch_rank must be at least 1"),
        ({"tolerance": 1.0}, "tolerance must be between 0 and 1, got 1.0"),
    ],
)
def test_options_out_of_range_are_refused_before_any_work(settings: dict, seen: str) -> None:
    with pytest.raises(SettingsError, match=seen):
        CollectionOptions(**settings)
