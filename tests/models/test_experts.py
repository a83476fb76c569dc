"""Fused experts and embeddings: per-expert Grams against a float64 loop over tokens, counts against a count."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import dense_twin as reference
from helpers import model_kinds as kinds
from helpers import tiny as cases
from hf_unlearn.constraints.binding import bind_constraints
from hf_unlearn.constraints.energy import EnergyConstraint
from hf_unlearn.constraints.ridge import RidgeConstraint
from hf_unlearn.constraints.step_constrainer import constrain_optimizer
from hf_unlearn.errors import ModelError
from hf_unlearn.models.layers import find_layers
from hf_unlearn.models.trainable import freeze_unprotected
from hf_unlearn.statistics.collect import collect_statistics

MIXTURES = {"Mixtral": kinds.drawn(kinds.mixtral), "Qwen-MoE": kinds.drawn(kinds.qwen_moe)}
EXPERTS = "model.layers.1.mlp.experts"


def seen_by_experts(model: Any, rows: list[cases.Row]) -> tuple[list[list[Any]], list[list[Any]]]:
    """Rows of each expert's two matrices, token by token, each row of data run alone."""
    module = model.get_submodule(EXPERTS)
    outer: list[list[Any]] = [[] for _ in range(4)]
    inner: list[list[Any]] = [[] for _ in range(4)]

    def keep(_: Any, args: tuple[Tensor, Tensor, Tensor]) -> None:
        for x, chosen in zip(args[0].double(), args[1].tolist(), strict=True):
            for expert in chosen:
                gate, up = (module.gate_up_proj[expert].double() @ x).view(2, -1)
                outer[expert].append(x.numpy())
                inner[expert].append((gate / (1 + torch.exp(-gate)) * up).numpy())

    handle = module.register_forward_pre_hook(keep)
    with torch.no_grad():
        for row in rows:
            model(**reference._alone(row))
    handle.remove()
    return outer, inner


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_the_grams_of_each_expert_are_those_of_the_tokens_routed_to_it(kind: str, implementation: str) -> None:
    model, rows = MIXTURES[kind](), kinds.text_rows(4)  # of unequal lengths: padding must not count
    outer, inner = seen_by_experts(model, rows)
    model.set_experts_implementation(implementation)
    statistics = collect_statistics(model, rows, batch_size=4, progress=False)
    for name, seen in (("gate_up_proj", outer), ("down_proj", inner)):
        grams = statistics.gram_sums[f"{EXPERTS}.{name}"].numpy()
        assert (
            statistics.positions[f"{EXPERTS}.{name}"]
            == sum(map(len, seen))
            == 2 * sum(len(r["input_ids"]) for r in rows)
        )
        for expert in range(4):
            expected = reference.gram_sum(np.array(seen[expert])) if seen[expert] else np.zeros(grams.shape[1:])
            np.testing.assert_allclose(grams[expert], expected, rtol=1e-3, atol=1e-4 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("kind", MIXTURES)
def test_mixtures_have_no_fisher_of_experts_and_routers(kind: str) -> None:
    model, rows = MIXTURES[kind](), kinds.text_rows(2)
    statistics = collect_statistics(model, rows, fisher=True, progress=False)
    assert not any("experts" in name or name.endswith("mlp.gate") for name in statistics.layers)
    assert f"{EXPERTS}.down_proj" in find_layers(model)
    assert "a layer without a Fisher: " in freeze_unprotected(model, statistics.layers).explain()
    with pytest.raises(ModelError, match=r"experts\.gate_up_proj has no Fisher"):
        collect_statistics(model, rows, fisher=True, layers=["*experts*"], progress=False)


@pytest.mark.parametrize("constraint", [EnergyConstraint(1.0), RidgeConstraint(0.1)])
def test_each_expert_has_its_own_constraint(constraint: Any) -> None:
    model, rows = MIXTURES["Mixtral"](), kinds.text_rows(3)
    statistics = collect_statistics(model, rows, progress=False)
    name = f"{EXPERTS}.gate_up_proj"
    step = torch.randn(4, 96, 32)
    constrained = bind_constraints(statistics, constraint)[name](step).numpy()
    outer, _ = seen_by_experts(model, rows)
    for expert, seen in enumerate(outer):
        factor = np.eye(32)
        if seen and isinstance(constraint, EnergyConstraint):
            factor = reference.energy_projector(np.array(seen), 1.0)
        elif seen:
            factor = reference.shrinkage(reference.gram_sum(np.array(seen)), 0.1)
        np.testing.assert_allclose(constrained[expert], step[expert].numpy() @ factor, rtol=1e-3, atol=2e-3)


def test_the_gram_of_an_embedding_counts_the_tokens_without_padding() -> None:
    model, rows = cases.tiny_gpt2(), cases.text_rows(5)
    with pytest.raises(ModelError, match=r"transformer\.wte has a tied weight \(lm_head\.weight"):
        find_layers(model, ["transformer.wte"])
    assert "transformer.wte" not in find_layers(model) and list(find_layers(model, ["transformer.w*"])) == [
        "transformer.wpe"
    ]
    model, rows = cases.tiny_llama(), cases.text_rows(5)
    assert "model.embed_tokens" not in find_layers(model)
    statistics = collect_statistics(model, rows, layers=["model.embed_tokens", "*_proj"], batch_size=3, progress=False)
    counts = Counter(token for row in rows for token in row["input_ids"])
    assert statistics.gram_sums["model.embed_tokens"].tolist() == [counts[token] for token in range(cases.VOCABULARY)]
    minus = statistics - collect_statistics(model, rows[:2], layers=["model.embed_tokens", "*_proj"], progress=False)
    assert minus.gram_sums["model.embed_tokens"].sum() == sum(len(row["input_ids"]) for row in rows[2:])


def test_positions_that_stand_for_the_whole_batch_count_for_each_row() -> None:
    model, rows = cases.tiny_gpt2(), cases.text_rows(5)
    statistics = collect_statistics(model, rows, layers=["transformer.wpe"], batch_size=5, progress=False)
    expected = [sum(len(row["input_ids"]) > place for row in rows) for place in range(32)]
    assert statistics.gram_sums["transformer.wpe"].tolist() == expected


@pytest.mark.parametrize("energy", [1.0, None])
def test_rows_of_retain_tokens_stay_and_those_of_other_tokens_move(energy: float | None) -> None:
    model = cases.tiny_llama()
    retain = [{"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4]}]
    forget = {"input_ids": torch.tensor([[1, 7, 8, 2]]), "labels": torch.tensor([[1, 7, 8, 2]])}
    statistics = collect_statistics(model, retain, layers=["model.embed_tokens"], fisher=True, progress=False)
    freeze_unprotected(model, statistics.layers, freeze=("model.layers.*",))
    weight, before = model.model.embed_tokens.weight, model.model.embed_tokens.weight.detach().clone()
    optimizer = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.1)
    constrain_optimizer(optimizer, model, statistics, None if energy is None else EnergyConstraint(energy))
    for _ in range(3):
        optimizer.zero_grad()
        (-model(**forget).loss).backward()
        optimizer.step()
    moved = (weight.detach() - before).abs().amax(1)
    assert moved[7] > 1e-3 and moved[8] > 1e-3
    assert moved[[1, 2, 3, 4]].max() == 0 if energy else moved[1] > 1e-3
    drift = optimizer.constrainer.drift()  # type: ignore[attr-defined]
    assert drift.by_layer["model.embed_tokens"] == 0 if energy else drift.kl > 0


def test_ridge_of_counts_is_the_ridge_of_their_dense_gram() -> None:
    model, rows = cases.tiny_llama(), cases.text_rows(3)
    statistics = collect_statistics(model, rows, layers=["model.embed_tokens"], progress=False)
    step = torch.randn(32, cases.VOCABULARY)
    constrained = bind_constraints(statistics, RidgeConstraint(0.5))["model.embed_tokens"](step)
    dense = np.diag(statistics.gram_sums["model.embed_tokens"].numpy())
    np.testing.assert_allclose(
        constrained.numpy(), step.numpy() @ reference.shrinkage(dense, 0.5), rtol=1e-4, atol=1e-5
    )
