"""Conv2d against a dense float64 twin that goes pixel by pixel, and the law on a plain convolutional net."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers import dense_twin as reference
from hf_unlearn.constraints.binding import bind_constraints
from hf_unlearn.constraints.energy import EnergyConstraint
from hf_unlearn.constraints.kronecker import KroneckerConstraint
from hf_unlearn.constraints.step_constrainer import constrain_optimizer
from hf_unlearn.models.layers import describe_layer
from hf_unlearn.models.trainable import freeze_unprotected
from hf_unlearn.statistics.collect import collect_statistics

SETTINGS = {
    "plain": {},
    "stride": {"stride": (2, 1)},
    "padding": {"padding": (2, 1)},
    "dilation": {"dilation": (1, 2), "padding": 1},
    "groups": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4, "stride": 2},
    "same": {"padding": "same", "dilation": 2},
    "even kernel, same": {"padding": "same", "kernel_size": (2, 4)},
    "valid": {"padding": "valid"},
    "reflect": {"padding": 2, "padding_mode": "reflect"},
    "replicate": {"padding": (1, 2), "padding_mode": "replicate", "groups": 2},
    "circular": {"padding": 1, "padding_mode": "circular", "stride": 2},
    "all": {"stride": 2, "padding": (1, 3), "dilation": (2, 1), "groups": 2, "kernel_size": (2, 3)},
}


class Net(nn.Module):
    """`pixel_values [B, 4, 7, 6] -> logits [B, 3]` through one convolution and a nonlinearity."""

    def __init__(self, **settings: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, **({"kernel_size": 3} | settings))  # type: ignore[arg-type]
        self.head = nn.Linear(8, 3)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.head(torch.tanh(self.conv(pixel_values)).mean((2, 3)))


def net(name: str) -> tuple[Net, list[dict[str, Tensor]]]:
    torch.manual_seed(0)
    rows = [{"pixel_values": torch.randn(4, 7, 6)} for _ in range(3)]
    return Net(**SETTINGS[name]).eval(), rows


@pytest.mark.parametrize("name", SETTINGS)
def test_grams_equal_those_of_the_pixel_by_pixel_twin(name: str) -> None:
    model, rows = net(name)
    statistics = collect_statistics(model, rows, batch_size=2, progress=False)
    seen_GNI = reference.patches(model.conv, torch.stack([row["pixel_values"] for row in rows]))
    expected = np.stack([reference.gram_sum(seen_NI) for seen_NI in seen_GNI])
    gram = statistics.gram_sums["conv"].numpy()
    np.testing.assert_allclose(gram, expected if model.conv.groups > 1 else expected[0], rtol=1e-5, atol=1e-5)
    assert statistics.positions["conv"] == seen_GNI.shape[0] * seen_GNI.shape[1]


@pytest.mark.parametrize("name", SETTINGS)
def test_the_rows_times_the_matrix_are_the_output(name: str) -> None:
    model, rows = net(name)
    layer = describe_layer(model.conv)
    assert layer is not None and layer.rows is not None and layer.output_rows is not None
    x = torch.stack([row["pixel_values"] for row in rows])
    seen, weight_OI = layer.rows(x), layer.weight_OI(model.conv.weight)
    if layer.blocks == 1:
        output = torch.einsum("bpi,oi->bpo", seen, weight_OI)
    else:
        output = torch.einsum("bpgi,goi->bpgo", seen, weight_OI)
    bias = model.conv.bias.view(1, -1, 1, 1)  # type: ignore[union-attr]
    torch.testing.assert_close(output, layer.output_rows(model.conv(x) - bias), rtol=1e-4, atol=1e-5)
    assert torch.equal(layer.stored(weight_OI), model.conv.weight)


@pytest.mark.parametrize("name", ["plain", "groups", "all"])
def test_fishers_equal_those_of_a_loop_over_labels(name: str) -> None:
    from hf_unlearn.data.row_identity import batch_hashes

    model, rows = net(name)
    statistics = collect_statistics(model, rows, fisher=True, progress=False)
    seeds = batch_hashes({"pixel_values": torch.stack([row["pixel_values"] for row in rows])})
    total = sum(reference.fisher_sum(model, row, "conv", None, seed)[0] for row, seed in zip(rows, seeds, strict=True))
    groups, outputs = model.conv.groups, 8 // model.conv.groups
    blocks = [total[g * outputs :][:outputs, g * outputs :][:, :outputs] for g in range(groups)]  # type: ignore[index]
    expected = np.stack(blocks) if groups > 1 else total
    np.testing.assert_allclose(statistics.fisher_sums["conv"].numpy(), expected, rtol=1e-4, atol=1e-9)
    bound = bind_constraints(statistics, KroneckerConstraint(0.1, 0.1))["conv"]
    step = torch.randn(8, *model.conv.weight.shape[1:])
    layer = describe_layer(model.conv)
    assert layer is not None
    constrained = layer.stored(bound(layer.weight_OI(step))).numpy()
    grams = statistics.gram("conv").reshape(groups, -1, statistics.gram_sums["conv"].shape[-1]).numpy()
    fishers = statistics.fisher("conv").reshape(groups, outputs, outputs).numpy()
    for g in range(groups):
        expected = reference.kronecker(
            step.reshape(groups, outputs, -1)[g].double().numpy(), grams[g], fishers[g], 0.1, 0.1
        )
        np.testing.assert_allclose(constrained.reshape(groups, outputs, -1)[g], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("energy", [1.0, None])
@pytest.mark.parametrize("name", ["stride", "reflect", "groups"])
def test_outputs_on_the_retain_images_stay_only_under_the_constraint(name: str, energy: float | None) -> None:
    model, rows = net(name)
    tiled = torch.randn(4, 1, 1).expand(4, 7, 6)  # few different patches: room is left in every group
    retain, forget = [{"pixel_values": tiled * factor} for factor in (1.0, 0.5)], rows
    statistics = collect_statistics(model, retain, progress=False)
    freeze_unprotected(model, statistics.layers, freeze=("head.*",))
    optimizer = torch.optim.AdamW([model.conv.weight], lr=1e-2)
    constrain_optimizer(optimizer, model, statistics, None if energy is None else EnergyConstraint(energy))
    images = [torch.stack([row["pixel_values"] for row in part]) for part in (retain, forget)]
    before = [model(x).detach() for x in images]
    for _ in range(5):
        optimizer.zero_grad()
        model(images[1])[:, 0].sum().backward()
        optimizer.step()
    moved = [(model(x) - old).abs().max().item() for x, old in zip(images, before, strict=True)]
    assert moved[1] > 1e-2
    assert moved[0] < 1e-5 if energy else moved[0] > 1e-3
    drift = optimizer.constrainer.drift().by_layer["conv"]  # type: ignore[attr-defined]
    assert drift < 1e-5 if energy else drift > 1e-3


def test_a_convolution_with_a_forward_pass_of_its_own_is_not_taken_for_one() -> None:
    class Standardised(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.conv2d(x, self.weight - self.weight.mean(), self.bias)

    assert describe_layer(Standardised(1, 2, 3)) is None


def test_activations_that_work_in_place_change_no_fisher() -> None:
    def layers(inplace: bool) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(inplace), nn.Conv2d(4, 4, 3), nn.ReLU(inplace), nn.Flatten(), nn.Linear(64, 5)
        )

    class Named(nn.Module):
        def __init__(self, inplace: bool) -> None:
            super().__init__()
            self.net = layers(inplace)

        def forward(self, pixel_values: Tensor) -> Tensor:
            return self.net(pixel_values)

    rows = [{"pixel_values": torch.randn(3, 8, 8), "labels": i % 5} for i in range(6)]
    plain, inplace = (collect_statistics(Named(kind), rows, fisher=True, progress=False) for kind in (False, True))
    for name, fisher_OO in plain.fisher_sums.items():
        assert fisher_OO.abs().max() > 1e-6 and torch.equal(inplace.fisher_sums[name], fisher_OO)
        assert torch.equal(inplace.gram(name), plain.gram(name))
