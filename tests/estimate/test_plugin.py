"""A constraint of a plug-in gets an estimate from its class attributes alone; no file of the estimate names one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest

import hf_unlearn.estimate
from helpers.tiny import tiny_llama
from hf_unlearn.constraints.base import Constraint
from hf_unlearn.constraints.factors import Factor, Scale
from hf_unlearn.constraints.registry import CONSTRAINTS, register_constraint
from hf_unlearn.errors import SettingsError
from hf_unlearn.estimate.fit import fastest_fit
from hf_unlearn.estimate.memory import estimate_memory
from hf_unlearn.estimate.sizes import EstimateSettings, Trace, factor_bytes
from hf_unlearn.estimate.times import Work, communication, estimate_times
from hf_unlearn.estimate.tracing import trace_model
from hf_unlearn.losses import build_loss
from hf_unlearn.statistics.eigen import Eigen

WORK = Work(10, 2, 2, 3, 1.0, 1.0, 1.0, 1.0)


@pytest.fixture
def plugin() -> Iterator[type[Constraint]]:
    """A two-sided, anchored constraint whose right factors take a quarter of a matrix."""

    @register_constraint("plugin")
    @dataclass(frozen=True)
    class PluginConstraint(Constraint):
        """Keep every step as it is."""

        needs_fisher: ClassVar[bool] = True
        anchored: ClassVar[bool] = True
        factor_share: ClassVar[float] = 0.25

        def right(self, gram: Eigen) -> Factor:
            return Scale(gram.spectrum_I.new_ones(gram.spectrum_I.numel()))

    yield PluginConstraint
    CONSTRAINTS.remove("plugin")


def small_trace() -> Trace:
    return trace_model(tiny_llama().config, "language-model", build_loss("ce_u"), batch_size=2, length=16, fisher=True)


def test_a_plugin_is_estimated_from_what_its_class_says(plugin: type[Constraint]) -> None:
    trace, settings = small_trace(), EstimateSettings("plugin")
    grams = sum(int(4 * n * n * 0.25) for n in trace.grams.values())
    fishers = sum(4 * layer.outputs**2 for layer in trace.layers.values())
    assert factor_bytes(trace, plugin) == grams + fishers
    assert settings.has_fishers and estimate_memory(trace, settings).held["constraint"] == grams + fishers
    flops = sum(
        4 * layer.outputs * layer.inputs**2 + 2 * layer.inputs * layer.outputs**2 for layer in trace.layers.values()
    )
    without = estimate_times(trace, EstimateSettings("none"), WORK)["step"].flops
    assert estimate_times(trace, settings, WORK)["step"].flops == pytest.approx(without + flops)
    two = replace(settings, processes=2, sharding="fsdp2", place="shards")
    assert communication(trace, two)["matrices"] > 0 and communication(trace, two)["constraint"] > 0
    assert fastest_fit(trace, settings, 2, 10**10) is not None


def test_an_attribute_of_the_class_changes_the_estimate(
    plugin: type[Constraint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control: the estimate depends on each attribute."""
    trace, settings = small_trace(), EstimateSettings("plugin", processes=2, sharding="fsdp2", place="shards")

    def everything() -> tuple[object, ...]:
        memory, times = estimate_memory(trace, settings), estimate_times(trace, settings, WORK)
        return memory.held["constraint"], times["step"].flops, communication(trace, settings)["matrices"]

    before = everything()
    for name, other in (("needs_fisher", False), ("anchored", False), ("factor_share", 1.0)):
        with monkeypatch.context() as patch:
            patch.setattr(plugin, name, other)
            assert everything() != before, name
    assert everything() == before


def test_an_unregistered_constraint_has_no_estimate() -> None:
    with pytest.raises(SettingsError, match="unknown constraint 'plugin'"):
        estimate_memory(small_trace(), EstimateSettings("plugin"))


def test_no_file_of_the_estimate_names_a_constraint() -> None:
    folder = Path(hf_unlearn.estimate.__file__).parent
    names = "|".join(name for name in CONSTRAINTS if name != "none")
    for file in folder.glob("*.py"):
        code = re.sub(r"^ *>>>.*$|^ *\.\.\..*$", "", file.read_text(), flags=re.MULTILINE)  # examples choose one
        assert not re.search(rf"""["']({names})["']""", code), file.name
