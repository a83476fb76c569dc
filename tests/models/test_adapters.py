"""Laws of LoRA under a constraint: the merged move is an allowed one, before and after merging, whatever the rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from helpers.tiny import tiny_gpt2, tiny_llama, tiny_vit
from helpers.training import FORGET, HOLDOUT, RETAIN, logits, settings
from hf_unlearn.constraints.binding import bind_constraints
from hf_unlearn.constraints.energy import EnergyConstraint
from hf_unlearn.constraints.step_constrainer import constrain_optimizer
from hf_unlearn.errors import CoverageError, ModelError, SettingsError, StatisticsError, UnlearningError
from hf_unlearn.models.adapters import base_name, check_adapters, is_adapter, layer_of
from hf_unlearn.models.fingerprint import weights_fingerprint
from hf_unlearn.models.layers import find_layers
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.trainer.trainer import UnlearningTrainer

LINEAR = {"llama": (tiny_llama, ["q_proj", "down_proj", "gate_proj"]), "gpt2": (tiny_gpt2, ["c_attn", "c_fc"])}


def lora(name: str, **changes: Any) -> LoraConfig:
    plain = {"r": 4, "lora_alpha": 8, "target_modules": LINEAR[name][1], "fan_in_fan_out": name == "gpt2"}
    return LoraConfig(**{**plain, **changes})


def merged_moves(model: Any) -> dict[str, Tensor]:
    """`scaling * B A` of each adapted layer, float64."""
    moves = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            a, b = (getattr(module, f"lora_{k}")["default"].weight.detach().double() for k in "AB")
            moves[base_name(name)] = module.scaling["default"] * b @ a
    return moves


def test_names_lead_back_to_the_base_model() -> None:
    deep = "base_model.model.model.layers.0.self_attn.q_proj"
    assert base_name(f"{deep}.base_layer.weight") == "model.layers.0.self_attn.q_proj.weight"
    assert base_name("base_model.model.score.modules_to_save.default.weight") == "score.weight"
    assert base_name("base_model.model.score.original_module.weight") == "score.weight"
    assert base_name("model.layers.0.mlp.weight") == "model.layers.0.mlp.weight"
    assert layer_of(f"{deep}.lora_B.default.weight") == ("model.layers.0.self_attn.q_proj", "B")
    assert layer_of("h.0.attn.c_attn.weight") == ("h.0.attn.c_attn", "")
    assert is_adapter(f"{deep}.lora_A.default.weight") and not is_adapter(f"{deep}.base_layer.weight")


@pytest.mark.parametrize("name", LINEAR)
def test_statistics_fit_the_model_with_and_without_adapter(name: str) -> None:
    build, _ = LINEAR[name]
    plain, adapted = build(), get_peft_model(build(), lora(name))
    assert weights_fingerprint(plain) == weights_fingerprint(adapted)
    assert list(find_layers(plain)) == list(find_layers(adapted))
    first, second = (collect_statistics(m, RETAIN, fisher=True, progress=False) for m in (plain, adapted))
    first.check_model(adapted)
    second.check_model(plain)
    for layer in first.layers:
        torch.testing.assert_close(first.gram(layer), second.gram(layer), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(first.fisher(layer), second.fisher(layer), rtol=1e-5, atol=1e-9)
    with torch.no_grad():
        next(p for n, p in adapted.named_parameters() if "base_layer" in n).add_(0.1)
    with pytest.raises(StatisticsError, match="other weights"):
        first.check_model(adapted)


@pytest.mark.parametrize(
    "changes", [{}, {"use_rslora": True}, {"lora_dropout": 0.3}], ids=["plain", "rslora", "dropout"]
)
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
@pytest.mark.parametrize("name", LINEAR)
def test_energy_one_keeps_retain_logits_before_and_after_merging(
    name: str, optim: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    model = LINEAR[name][0]()
    before = logits(model, RETAIN), logits(model, FORGET)
    args = settings(tmp_path, optim=optim, learning_rate=2e-2, weight_decay=0.1, max_grad_norm=1.0, max_steps=10)
    statistics = collect_statistics(model, RETAIN, progress=False)
    trainer = UnlearningTrainer(model, args, FORGET, statistics=statistics, peft_config=lora(name, **changes))
    trainer.train()
    adapted: Any = trainer.model
    assert isinstance(adapted, PeftModel) and not trainer.coverage.exposed
    assert all(".lora_" in n for n, p in adapted.named_parameters() if p.requires_grad)
    retain, forget = logits(adapted, RETAIN), logits(adapted, FORGET)
    assert (retain - before[0]).abs().max() < 1e-5 and (forget - before[1]).abs().max() > 1e-2
    with trainer.original_model():
        torch.testing.assert_close(logits(adapted, FORGET), before[1], rtol=1e-6, atol=1e-6)
    whole = adapted.merge_and_unload()
    assert (logits(whole, RETAIN) - before[0]).abs().max() < 1e-5
    torch.testing.assert_close(logits(whole, FORGET), forget, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LINEAR)
def test_without_constraint_the_adapter_moves_retain_logits(name: str, tmp_path: Path) -> None:
    model = LINEAR[name][0]()
    before = logits(model, RETAIN)
    args = settings(tmp_path, constraint="none", learning_rate=2e-2, max_steps=10)
    trainer = UnlearningTrainer(model, args, FORGET, peft_config=lora(name))
    trainer.train()
    assert (logits(trainer.model, RETAIN) - before).abs().max() > 1e-2
    assert trainer.coverage.exposed and not trainer.coverage.protected


@pytest.mark.parametrize("constraint", ["energy", "ridge", "kronecker"])
def test_the_merged_move_has_the_form_of_the_constraint(constraint: str, tmp_path: Path) -> None:
    """`L^(1/2) X R^(1/2)` with X of rank r, however many steps; and the drift is that of the merged weights."""
    model = tiny_llama()
    weights = {n: p.detach().double().clone() for n, p in model.named_parameters()}
    statistics = collect_statistics(model, RETAIN, fisher=True, progress=False)
    energy = {"constraint_settings": {"energy": 0.9} if constraint == "energy" else None}
    args = settings(tmp_path, constraint=constraint, learning_rate=2e-2, optim="adamw_torch", max_steps=8, **energy)
    trainer = UnlearningTrainer(model, args, FORGET, statistics=statistics, peft_config=lora("llama"))
    trainer.train()
    moves = merged_moves(trainer.model)
    bound = bind_constraints(statistics, args.build_constraint())
    drift, squares, kl = trainer.constrainer.drift(), [], 0.0
    assert moves.keys() == drift.by_layer.keys()
    for name, move_OI in moves.items():
        right = bound[name].right
        assert right is not None and move_OI.norm() > 1e-3
        full_II = right(torch.eye(move_OI.shape[1])).double()
        values, vectors = torch.linalg.eigh(full_II)
        held = vectors[:, values < 1e-6]  # removed wholly
        assert (move_OI @ held).norm() <= 1e-5 * move_OI.norm()
        kept = values > 1e-6
        inner_OI = move_OI @ (vectors[:, kept] / values[kept].sqrt()) @ vectors[:, kept].T
        assert torch.linalg.matrix_rank(inner_OI, rtol=1e-4) <= 4
        gram_II = statistics.gram(name)
        weight_OI = weights[f"{name}.weight"]
        share = torch.trace(move_OI @ gram_II @ move_OI.T) / torch.trace(weight_OI @ gram_II @ weight_OI.T)
        assert drift.by_layer[name] == pytest.approx(share.sqrt().item(), rel=1e-3, abs=1e-6)
        squares.append(share)
        scale = statistics.positions_per_label(name) / 2
        kl += scale * torch.trace(statistics.fisher(name) @ move_OI @ gram_II @ move_OI.T).item()
    assert drift.kl == pytest.approx(kl, rel=1e-3, abs=1e-9)


def test_softer_constraints_drift_less_than_none(tmp_path: Path) -> None:
    """At steps of the same merged norm; the point of a constraint on an adapter at all."""

    def drift(constraint: str) -> float:
        model = tiny_llama()
        statistics = collect_statistics(model, RETAIN, fisher=True, progress=False)
        args = settings(tmp_path, constraint=constraint, learning_rate=2e-2, max_steps=6)
        trainer = UnlearningTrainer(model, args, FORGET, statistics=statistics, peft_config=lora("llama"))
        trainer.train()
        return trainer.constrainer.drift().relative

    free = drift("none")
    assert drift("kronecker") < free / 4 and drift("ridge") < free / 4 and drift("energy") < 1e-6


@pytest.mark.parametrize("constraint", ["energy", "none"])
def test_the_learning_rate_is_the_relative_norm_of_a_merged_step(constraint: str, tmp_path: Path) -> None:
    model = tiny_llama()
    names = [n for n in find_layers(model) if n.split(".")[-1] in LINEAR["llama"][1]]
    size = torch.stack([model.get_submodule(n).weight.detach().norm() for n in names]).norm().item()
    statistics = collect_statistics(model, RETAIN, progress=False)
    args = settings(tmp_path, constraint=constraint, learning_rate=1e-2, max_steps=1)
    trainer = UnlearningTrainer(model, args, FORGET, statistics=statistics, peft_config=lora("llama"))
    trainer.train()
    moved = torch.stack([m.norm() for m in merged_moves(trainer.model).values()]).norm().item()
    assert moved == pytest.approx(1e-2 * size, rel=0.05)


def test_a_saved_adapter_loads_to_the_same_logits(tmp_path: Path) -> None:
    args = settings(tmp_path / "out", learning_rate=2e-2)
    trainer = UnlearningTrainer(tiny_llama(), args, FORGET, RETAIN, peft_config=lora("llama"))
    trainer.train()
    trainer.save_model()
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "out").eval()
    torch.testing.assert_close(logits(again, FORGET), logits(trainer.model, FORGET), rtol=1e-6, atol=1e-6)
    assert (logits(again, FORGET) - logits(tiny_llama(), FORGET)).abs().max() > 1e-3


def test_modules_to_save_are_protected_as_full_weights(tmp_path: Path) -> None:
    from helpers.tiny import image_rows
    from hf_unlearn.data.batches import PaddingCollator

    retain, forget = image_rows(6, seed=1), image_rows(6, seed=2)
    model = tiny_vit()
    statistics = collect_statistics(model, retain, collator=PaddingCollator(), progress=False)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])
    args = settings(tmp_path, learning_rate=1e-2)
    trainer = UnlearningTrainer(
        model, args, forget, statistics=statistics, peft_config=config, data_collator=PaddingCollator()
    )
    trainer.train()
    assert any("modules_to_save" in n for n in trainer.coverage.protected)
    drift = trainer.constrainer.drift().by_layer
    assert "classifier" in drift and all(value < 1e-5 for value in drift.values())


def test_without_the_trainer_any_loop_is_constrained() -> None:
    model: Any = get_peft_model(tiny_llama(), lora("llama"))
    statistics = collect_statistics(model, RETAIN, progress=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    constrain_optimizer(optimizer, model, statistics, EnergyConstraint(1.0))
    before = logits(model, RETAIN), logits(model, FORGET)
    from helpers.tiny import collate

    for _ in range(10):
        optimizer.zero_grad()
        (-model(**collate(FORGET)).loss).backward()
        optimizer.step()
    assert (logits(model, RETAIN) - before[0]).abs().max() < 1e-5
    assert (logits(model, FORGET) - before[1]).abs().max() > 1e-2


def adapted(config: Any) -> nn.Module:
    return get_peft_model(tiny_llama(), config)


REFUSED = {
    "dora": (lambda: adapted(lora("llama", use_dora=True)), "DoRA"),
    "pissa": (lambda: adapted(lora("llama", init_lora_weights="pissa")), "init_lora_weights='pissa'"),
    "olora": (lambda: adapted(lora("llama", init_lora_weights="olora")), "init_lora_weights='olora'"),
    "random B": (lambda: adapted(lora("llama", init_lora_weights=False)), "init_lora_weights=False"),
    "ia3": (lambda: adapted(IA3Config(target_modules=["k_proj"], feedforward_modules=[])), "IA3"),
    "adalora": (lambda: adapted(AdaLoraConfig(target_modules=["q_proj"], total_step=10)), "ADALORA"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_adapters_that_break_the_form_are_refused_by_name(name: str) -> None:
    build, message = REFUSED[name]
    with pytest.raises(ModelError, match=message) as raised:
        check_adapters(build())
    assert "\n" not in str(raised.value)


def test_a_trained_adapter_is_refused(tmp_path: Path) -> None:
    model: Any = adapted(lora("llama"))
    check_adapters(model)
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.add_(0.1)
    with pytest.raises(ModelError, match="has been trained"):
        UnlearningTrainer(model, settings(tmp_path), FORGET, RETAIN)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"peft_config": {"r": 4}}, SettingsError, "must be a peft.LoraConfig"),
        ({"peft_config": lora("llama"), "model": "adapted"}, SettingsError, "has an adapter already"),
        ({"peft_config": LoraConfig(target_modules=["nope"])}, SettingsError, "LoRA settings"),
        ({"peft_config": LoraConfig(target_modules=["embed_tokens"])}, CoverageError, "embed"),
    ],
    ids=["no config", "twice", "no such module", "embedding"],
)
def test_wrong_adapter_settings_are_one_line(
    changes: dict[str, Any], error: type[UnlearningError], message: str, tmp_path: Path
) -> None:
    model = adapted(lora("llama")) if changes.pop("model", None) else tiny_llama()
    with pytest.raises(error, match=message) as raised:
        UnlearningTrainer(model, settings(tmp_path), FORGET, RETAIN, holdout_dataset=HOLDOUT, **changes)
    assert "\n" not in str(raised.value)
