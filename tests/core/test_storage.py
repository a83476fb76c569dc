"""Laws of storage: statistics kept in main memory, on disk or collected in several passes are equal to the bit."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from helpers.tiny import text_rows, tiny_gpt2, tiny_llama
from helpers.training import FORGET, RETAIN, settings, trained
from hf_unlearn.constraints.binding import bind_constraints
from hf_unlearn.constraints.energy import EnergyConstraint
from hf_unlearn.constraints.kronecker import KroneckerConstraint
from hf_unlearn.core.storage import PLACES, Storage
from hf_unlearn.errors import SettingsError
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.statistics.retain_statistics import RetainStatistics
from hf_unlearn.trainer.trainer import UnlearningTrainer

ROWS = text_rows(9)
MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


def same(a: RetainStatistics, b: RetainStatistics) -> bool:
    """Equal to the bit, in everything that is saved."""
    sums = [(a.gram_sums, b.gram_sums), (a.fisher_sums, b.fisher_sums)]
    equal = all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in sums)
    return equal and a._metadata() == b._metadata()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("model", MODELS)
def test_statistics_and_constraints_are_the_same_wherever_they_are_kept(place: str, model: str, tmp_path: Path) -> None:
    expected = collect_statistics(MODELS[model](), ROWS, fisher=True, progress=False)
    other = collect_statistics(MODELS[model](), ROWS, fisher=True, keep_on=place, progress=False)
    less = collect_statistics(MODELS[model](), ROWS[:2], fisher=True, progress=False)
    assert other.storage.place == place and same(expected, other) and same(expected - less, other - less)
    assert (other - less).storage.place == place and not same(expected, other - less)
    assert same(expected.kept_on(place), expected)
    again = RetainStatistics.from_pretrained(other.save_pretrained(tmp_path / "s"), keep_on=place)
    assert same(again, expected) and again.storage.place == place
    layer = next(iter(expected.layers.values()))
    for constraint in (EnergyConstraint(0.9), KroneckerConstraint()):
        step_OI = torch.randn(layer.outputs, len(next(iter(expected.gram_sums.values()))))
        here, there = (next(iter(bind_constraints(s, constraint).values())) for s in (expected, again))
        assert torch.equal(here(step_OI), there(step_OI)) and not torch.equal(here(step_OI), step_OI)


def test_what_is_kept_on_disk_is_mapped_and_leaves_no_file() -> None:
    before = set(os.listdir(tempfile.gettempdir()))
    tensor = torch.randn(1 << 12, 1 << 11)  # 32 MiB
    kept = Storage("disk").keep(tensor)
    process: Any = psutil.Process()
    mapped = [m for m in process.memory_maps(grouped=False) if "hf_unlearn-" in m.path]
    assert mapped and torch.equal(kept, tensor)
    assert kept.data_ptr() != tensor.data_ptr() and Storage("device").keep(tensor) is tensor
    left = {name for name in set(os.listdir(tempfile.gettempdir())) - before if name.startswith("hf_unlearn-")}
    assert not left
    del kept, mapped
    assert not [m for m in process.memory_maps(grouped=False) if "hf_unlearn-" in m.path]


@pytest.mark.parametrize("fisher", [False, True], ids=["gram", "fisher"])
@pytest.mark.parametrize("model", MODELS)
def test_several_passes_under_a_memory_limit_give_what_one_pass_gives(
    model: str, fisher: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = collect_statistics(MODELS[model](), ROWS, fisher=fisher, batch_size=2, progress=False)
    limit = 6 * sum(v.numel() * 8 for sums in (expected.gram_sums, expected.fisher_sums) for v in sums.values()) // 10
    several = collect_statistics(MODELS[model](), ROWS, fisher=fisher, batch_size=2, max_memory=limit, keep_on="disk")
    assert same(expected, several)
    passes = [line for line in capsys.readouterr().err.split("\r") if "Collecting (" in line]
    assert any("(2/" in line for line in passes)  # the control: there was more than one pass
    assert same(expected, collect_statistics(MODELS[model](), ROWS, fisher=fisher, batch_size=2, max_memory="1GB"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_memory": "much"}, "size such as '4GB'"),
        ({"max_memory": 1000}, "above max_memory 1000"),
        ({"keep_on": "tape"}, "not 'tape'"),
    ],
)
def test_a_wrong_place_or_size_is_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as raised:
        collect_statistics(tiny_llama(), ROWS, progress=False, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_a_run_is_the_same_wherever_statistics_are_kept(place: str, tmp_path: Path) -> None:
    def end(**changes: Any) -> dict[str, torch.Tensor]:
        model = tiny_llama()
        args = settings(tmp_path, constraint="kronecker", learning_rate=1e-2, max_steps=3, **changes)
        UnlearningTrainer(model, args, FORGET, RETAIN).train()
        return trained(model)

    here, there = end(), end(keep_statistics_on=place, max_memory="100KB")
    assert all(torch.equal(here[name], there[name]) for name in here)
    assert any(not torch.equal(here[name], w) for name, w in trained(tiny_llama()).items())
    with pytest.raises(SettingsError, match="not 'tape'"):
        settings(tmp_path, keep_statistics_on="tape")
