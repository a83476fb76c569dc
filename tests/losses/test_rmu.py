"""Laws of losses that read hidden states: each equals its twin, lowers the forget probability when followed downhill,
and names the layers that exist."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from helpers import reference_losses as reference
from helpers.loss_batches import Batch, before, dense, forget_likelihood, memorised, moved, step
from helpers.tiny import (
    CASES,
    collate,
    requires_asset,
    sharpen,
    text_rows,
    tiny_gpt2,
    tiny_llama,
    tiny_mlp,
    tiny_vit,
    vector_rows,
)
from hf_unlearn.errors import ModelError, SettingsError
from hf_unlearn.losses import build_loss
from hf_unlearn.models.forward import find_module, predict

TEXT = ("gpt2", "llama")
HIDDEN = ("gpt2", "llama", "bert", "vit")


def with_alternates(case: str) -> tuple[nn.Module, nn.Module, Batch]:
    """(model, original, batch) with alternate answers of other lengths than the forget answers."""
    make, rows = CASES[case]
    original = sharpen(make(), 1.5)
    alternate = text_rows(4, seed=9, lengths=(5, 8, 4, 6))
    batch = {"forget": collate(rows(4, seed=1)), "retain": collate(rows(3, seed=2)), "alternate": collate(alternate)}
    return moved(original), original, batch


def states(model: nn.Module, inputs: Batch, layer: int) -> np.ndarray:
    """Outputs of a block at the positions that count, `[N, D]`, by transformers' own list of hidden states."""
    with torch.no_grad():
        result = model(**{k: v for k, v in inputs.items() if k != "labels"}, output_hidden_states=True)
    hidden = result.hidden_states[layer + 1]
    labels = inputs["labels"]
    if labels.ndim == 2:
        return hidden[:, :-1][labels[:, 1:] != -100].numpy()
    mask = inputs.get("attention_mask", torch.ones(hidden.shape[:2])).bool()
    return [row[keep].numpy() for row, keep in zip(hidden, mask, strict=True)]  # a mean per row first


def mean_distance(result: Any, target: Any) -> float:
    if isinstance(result, np.ndarray):
        return reference.distance(result, np.broadcast_to(target, result.shape))
    targets = target if isinstance(target, list) else [np.broadcast_to(target, one.shape) for one in result]
    return float(np.mean([reference.distance(a, b) for a, b in zip(result, targets, strict=True)]))


def direction(width: int, seed: int = 0) -> np.ndarray:
    u = torch.rand(width, generator=torch.Generator().manual_seed(seed)).double().numpy()
    return u / np.sqrt(np.sum(u * u))


@pytest.mark.parametrize("case", HIDDEN)
def test_rmu_equals_its_twin(case: str) -> None:
    make, rows = CASES[case]
    original = make()
    model = moved(original)
    batch = {"forget": collate(rows(4, seed=1)), "retain": collate(rows(3, seed=2))}
    scope = before(model, original)
    result = states(model, batch["forget"], 0)
    width = (result if isinstance(result, np.ndarray) else result[0]).shape[-1]

    def value(**settings: Any) -> float:
        return build_loss("rmu", {"layer": 0, **settings})(model, batch, scope).item()

    twin = mean_distance(result, 2 * direction(width))
    assert value(alpha=0) == pytest.approx(twin, rel=1e-5)
    assert value(alpha=0, coefficient=20, seed=3) == pytest.approx(
        mean_distance(result, 20 * direction(width, 3)), rel=1e-5
    )
    assert abs(value(alpha=0, layer=-1 if case == "vit" else 1) - twin) > 1e-3
    now, then = states(model, batch["retain"], 0), states(original, batch["retain"], 0)
    retain = mean_distance(now, then)
    assert value(gamma=0) == pytest.approx(retain, rel=1e-5) and retain > 1e-4
    assert value(gamma=0.5, alpha=3) == pytest.approx(0.5 * twin + 3 * retain, rel=1e-5)
    likelihood = reference.retain_nll(dense(model, batch["retain"]))
    assert value(gamma=0, retain="nll") == pytest.approx(likelihood, rel=1e-5)


@pytest.mark.parametrize("case", HIDDEN)
def test_steps_down_rmu_bring_the_states_to_the_target_and_lower_the_forget_probability(case: str) -> None:
    make, rows = CASES[case]
    original = make()
    model = copy.deepcopy(original)
    batch = {"forget": memorised(original, collate(rows(4, seed=1)))}
    loss = build_loss("rmu", {"layer": 1, "coefficient": 10.0})
    first = loss(model, batch).item()
    for _ in range(8):
        step(model, loss(model, batch), 0.2)
    assert loss(model, batch).item() < 0.95 * first
    if case in TEXT:  # an untrained classifier may happen to find its label in the direction of the target
        assert forget_likelihood(model, batch) < forget_likelihood(original, batch) - 1e-3


def test_small_steps_down_rmu_lower_the_probability_of_a_real_story() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = requires_asset("stories260K")
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(folder).encode("Once upon a time, there was a little girl named Lily.")
    batch = {"forget": collate([{"input_ids": tokens, "labels": tokens}])}
    model, loss = copy.deepcopy(original), build_loss("rmu", {"layer": 2})
    for _ in range(3):
        step(model, loss(model, batch), 0.3)
    assert forget_likelihood(model, batch) < forget_likelihood(original, batch) - 1e-3
    assert loss(model, batch) < loss(original, batch)


def test_rmu_trains_no_weight_after_its_layer_but_reaches_all_of_them() -> None:
    model = tiny_llama()
    build_loss("rmu", {"layer": 0})(model, {"forget": collate(text_rows(3))}).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name  # data parallel processes wait for each of them
        after = ".layers.1." in name or name.startswith(("model.norm", "lm_head"))
        assert after == (parameter.grad.abs().max() == 0), name


def test_rmu_layer_is_a_block_or_a_name_and_errors_say_which_there_are() -> None:
    model, batch = tiny_gpt2(), {"forget": collate(text_rows(3))}
    by_name = build_loss("rmu", {"layer": "transformer.h.1"})(model, batch)
    assert torch.equal(by_name, build_loss("rmu", {"layer": 1})(model, batch))
    assert find_module(model, -1) is model.transformer.h[1] and find_module(tiny_vit(), 0) is not None
    assert build_loss("rmu").layer == 7
    with pytest.raises(SettingsError, match="layer is 7, the model has blocks 0 to 1; choose"):
        build_loss("rmu")(model, batch)
    with pytest.raises(SettingsError, match="the model has no module 'h\\.1'"):
        build_loss("rmu", {"layer": "h.1"})(model, batch)
    with pytest.raises(SettingsError, match="no stack of blocks; give layer the name of a module"):
        build_loss("rmu")(tiny_mlp(), {"forget": collate(vector_rows(3))})
    assert torch.isfinite(build_loss("rmu", {"layer": "first"})(tiny_mlp(), {"forget": collate(vector_rows(3))}))
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    model.transformer.wte.requires_grad_(False)
    with pytest.raises(ModelError, match="does not depend on a trainable weight"):
        build_loss("rmu", {"layer": 1})(model, batch)


def test_the_blocks_of_a_model_are_its_outermost_list_of_modules() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(
        nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(2, 2) for _ in range(9))}) for _ in range(3)
    )
    assert find_module(model, 2) is model.layers[2]
    with pytest.raises(SettingsError, match="blocks 0 to 2"):
        find_module(model, 5)


def test_the_blocks_of_an_encoder_decoder_are_its_decoders() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=29, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    assert find_module(model, 1) is model.decoder.block[1]
    inputs = {"input_ids": torch.randint(1, 29, (2, 9)), "labels": torch.randint(1, 29, (2, 4))}
    result = predict(model, inputs, False, 1).hidden
    assert result is not None and result.states_LPD.shape == (8, 1, 16)
    with pytest.raises(ModelError, match=r"outputs \[2, 9, 16\] are not one state for each label position \(4\)"):
        predict(model, inputs, False, "encoder.block.1")
    model.spare = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="layer 'spare' did not run"):
        predict(model, inputs, False, "spare")


def test_any_loss_may_keep_the_hidden_states_of_retain_rows() -> None:
    model, original, batch = with_alternates("llama")
    loss = build_loss("npo", {"gamma": 0, "retain": "hidden", "layer": 1})
    assert loss.original_contents == {"forget": "nll", "retain": "hidden"}
    expected = mean_distance(states(model, batch["retain"], 1), states(original, batch["retain"], 1))
    # transformers' last hidden state is normalised, the block's own output is not
    assert abs(loss(model, batch, before(model, original)).item() - expected) > 1e-3
    loss = build_loss("npo", {"gamma": 0, "retain": "hidden", "layer": 0})
    expected = mean_distance(states(model, batch["retain"], 0), states(original, batch["retain"], 0))
    assert loss(model, batch, before(model, original)).item() == pytest.approx(expected, rel=1e-5)
    assert loss(original, batch, before(original, original)).item() == 0
