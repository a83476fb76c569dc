"""Laws of the scopes: what changes inside is back afterwards, also on exceptions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers import tiny
from hf_unlearn.models.modes import eval_mode, hold_norm_statistics, restored, trainable_flags_restored


def test_each_module_gets_its_own_mode_back() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5)).train()
    hold_norm_statistics(model)
    with pytest.raises(KeyError), eval_mode(model):
        assert not any(module.training for module in model.modules())
        raise KeyError
    assert [module.training for module in model] == [True, False, True]


def test_everything_is_restored_to_the_bit() -> None:
    model = tiny.tiny_mlp().train()
    first, *others = model.parameters()
    first.grad = torch.ones_like(first)
    others[0].requires_grad_(False)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    with pytest.raises(KeyError), restored(model):
        assert first.grad is None and not model.training
        torch.rand(3)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
            parameter.grad = torch.zeros_like(parameter)
            parameter.data.add_(1)
        assert not torch.equal(first, weights["first.weight"])
        raise KeyError
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model.training and first.grad is not None and bool(first.grad.all())
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, False, *[True] * (len(others) - 1)]


def test_only_what_was_trainable_is_trainable_again() -> None:
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    with pytest.raises(KeyError), trainable_flags_restored(model):
        model.weight.requires_grad_(False)
        raise KeyError
    assert model.weight.requires_grad and not model.bias.requires_grad


def test_batch_norms_are_held_and_nothing_else() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.LayerNorm(3)).train()
    hold_norm_statistics(model)
    assert [module.training for module in model] == [True, False, True, True]
    before = model[1].running_mean.clone()
    model(torch.randn(8, 3) + 5)
    assert torch.equal(model[1].running_mean, before)
    model.train()
    model(torch.randn(8, 3) + 5)
    assert not torch.equal(model[1].running_mean, before)
