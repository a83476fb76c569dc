"""Laws of sharding: what a constraint cannot support is refused by name, and every group that moves is constrained."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from helpers.tiny import collate, text_rows, tiny_llama
from helpers.training import FORGET, RETAIN, logits, trained
from hf_unlearn.constraints.energy import EnergyConstraint
from hf_unlearn.constraints.step_constrainer import constrain_optimizer
from hf_unlearn.core.sharding import check_sharding, sharding_of
from hf_unlearn.errors import ModelError, SettingsError
from hf_unlearn.models.trainable import freeze_unprotected
from hf_unlearn.statistics.collect import collect_statistics


def accelerator(version: int = 2, **plugin: Any) -> Any:
    settings = {"fsdp_version": version, "cpu_ram_efficient_loading": False, **plugin}
    return SimpleNamespace(state=SimpleNamespace(fsdp_plugin=SimpleNamespace(**settings)))


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (accelerator(version=1), "set fsdp_version: 2"),
        (accelerator(cpu_ram_efficient_loading=True), "cpu_ram_efficient_loading"),
    ],
    ids=["FSDP1", "loaded by one process"],
)
def test_sharding_without_whole_matrices_or_anchors_is_refused_by_name(refused: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as raised:
        check_sharding(refused, tiny_llama())
    assert "\n" not in str(raised.value)
    check_sharding(accelerator(), tiny_llama())  # the control
    assert sharding_of(accelerator()) == "fsdp2" and sharding_of(SimpleNamespace(state=SimpleNamespace())) == "none"


def test_weights_that_deepspeed_partitioned_at_loading_are_refused() -> None:
    model = tiny_llama()
    next(model.parameters()).ds_id = 0
    with pytest.raises(ModelError, match="load the model before creating UnlearningConfig"):
        collect_statistics(model, text_rows(2), progress=False)


@pytest.mark.parametrize("rates", [(0.0, 0.0), (0.0, 1e-2), (1e-2, 0.0)], ids=str)
def test_a_group_that_moves_is_constrained_whatever_the_rates_of_others(rates: tuple[float, float]) -> None:
    model = tiny_llama()
    statistics = collect_statistics(model, RETAIN, progress=False)
    freeze_unprotected(model, statistics.layers)
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": parameters[i::2], "lr": rate} for i, rate in enumerate(rates)]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    constrain_optimizer(optimizer, model, statistics, EnergyConstraint(1.0))
    start, before = trained(model), logits(model, RETAIN)
    for _ in range(3):
        optimizer.zero_grad()
        (-model(**collate(FORGET)).loss).backward()
        optimizer.step()
    moved = any(not torch.equal(start[name], weight) for name, weight in trained(model).items())
    assert moved == any(rates) and (logits(model, RETAIN) - before).abs().max() < 1e-5
