"""Test whether a trainable scaling of the core gradient space helps to remove poisoned labels (see `pgu.py`).

    python recipes/experiments/pgu.py poison CIFAR10.npz --output_dir outputs/pgu/poison-0
    python recipes/experiments/pgu_scaling.py CIFAR10.npz outputs/pgu/poison-0

PGU's authors let their poison variant move inside the core space as well (`depoisoning.py`, `backbone/layers.py`): each
layer computes with `W + W U (S - 1) U^T`, where the basis U of the core space is fixed and S (K x K, from the identity;
of a linear layer the last 400 directions at most) is trained at a tenth of the learning rate, while the steps of W stay
orthogonal to U. Their script needs files that their repository lacks. Here the same loop runs with S, at that rate and
lower ones, and without it, from the original model that `pgu.py` saved. The model is evaluated after every epoch. The
table has the epoch in which the target of the held-out rows is reached, and the last one (held-out accuracy has dropped
by 5 points).
"""

import argparse
import copy
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pgu import HERE, PAPER, SCENARIOS, Images, accuracy, collect, load, probabilities, read, settings, trained_net
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_unlearn import EnergyConstraint, RetainStatistics, build_loss
from hf_unlearn.cli import setup
from hf_unlearn.models import modes
from hf_unlearn.statistics import leading_basis

LINEAR_DIRECTIONS = 400


class Scaled(nn.Module):
    """`W -> W + W U (S - 1) U^T`, the weight seen as `[O, I]`."""

    def __init__(self, basis_IK: Tensor, directions: int):
        super().__init__()
        self.register_buffer("basis_IK", basis_IK)
        self.register_buffer("scaled_IS", basis_IK[:, -directions:])
        self.change_SS = nn.Parameter(torch.zeros(self.scaled_IS.shape[1], self.scaled_IS.shape[1]))  # S - 1

    def forward(self, weight: Tensor) -> Tensor:
        weight_OI = weight.flatten(1)
        return (weight_OI + weight_OI @ self.scaled_IS @ self.change_SS @ self.scaled_IS.T).view_as(weight)


def add_scaling(model: nn.Module, statistics: RetainStatistics, constraint: EnergyConstraint) -> list[Any]:
    """Freeze everything except the weights of the layers and their S; return the layers."""
    model.requires_grad_(False)
    layers = []
    for name in statistics.layers:
        layer: Any = model.get_submodule(name)
        basis_IK = leading_basis(statistics.gram(name), constraint.energy, constraint.spectrum).float()
        directions = min(basis_IK.shape[1], LINEAR_DIRECTIONS if isinstance(layer, nn.Linear) else basis_IK.shape[1])
        layer.weight.requires_grad_(True)
        parametrize.register_parametrization(layer, "weight", Scaled(basis_IK, directions))
        layers.append(layer.parametrizations.weight)
    return layers


def epochs(model: nn.Module, layers: list[Any], forget: Images, config: Any, rate_share: float) -> Iterator[None]:
    """Run the training loop of the authors; yield after each epoch."""
    pixels, labels = torch.from_numpy(forget.pixels), torch.from_numpy(forget.labels)
    loss = build_loss(config.loss, config.loss_settings)
    weights, scales = [layer.original for layer in layers], [layer[0].change_SS for layer in layers]
    groups = [{"params": weights}, {"params": scales}]
    optimizer = torch.optim.SGD(groups, lr=config.learning_rate)
    count = int(config.num_train_epochs)
    for epoch in range(count):
        rate = config.learning_rate * (config.final_learning_rate / config.learning_rate) ** (epoch / count)
        for group, share in zip(optimizer.param_groups, (1.0, rate_share), strict=True):
            group["lr"] = rate * share
        modes.hold_norm_statistics(model.train())
        for part in torch.randperm(len(labels)).split(config.per_device_train_batch_size):
            optimizer.zero_grad()
            loss(model, {"forget": {"pixel_values": pixels[part], "labels": labels[part]}}).backward()
            for layer in layers:
                basis_IK, gradient_OI = layer[0].basis_IK, layer.original.grad.flatten(1)
                layer.original.grad = (gradient_OI - gradient_OI @ basis_IK @ basis_IK.T).view_as(layer.original)
            optimizer.step()
        yield


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path, help="output folder of `pgu.py poison`")
    parser.add_argument("--epochs", type=int, default=100, help="at most")
    shares = {"type": float, "nargs": "+", "default": [0, 0.1, 0.01, 0.001]}
    parser.add_argument("--rate_shares", **shares, help="learning rate of S over that of W; 0: no S; 0.1 is theirs")
    args = parser.parse_args()
    setup.hush(bars=False)
    pgu_run = read(args.folder)
    scenario, share, seed = SCENARIOS["poison"], pgu_run["images"] / PAPER, pgu_run["seed"]
    train, holdout, test = load(args.data, pgu_run["images"], seed)
    (poisoned,) = scenario.requests(train, share)
    train.labels[poisoned] = train[poisoned].flipped(seed).labels
    forget, flipped = train[poisoned], holdout.flipped(seed)
    model = trained_net(
        args.folder / "original.safetensors", pgu_run["net"], pgu_run["width"], train, pgu_run["epochs"], seed
    )
    mark = accuracy(probabilities(model, flipped), flipped.labels)
    lowest = accuracy(probabilities(model, holdout), holdout.labels) - 0.05
    config = settings(HERE / "pgu_poison.yaml", args.folder / "scaling", share, seed)
    constraint = config.build_constraint()
    assert isinstance(constraint, EnergyConstraint)
    statistics = collect(model, train, fisher=False) - collect(model, forget, fisher=False)
    retain = train[[i for i in range(len(train)) if i not in set(poisoned)]]

    print("| rate of S | epoch | forget | clean label back | retain | test | s |\n|---|---:|---:|---:|---:|---:|---:|")
    for rate_share in args.rate_shares:
        torch.manual_seed(seed)
        net, start, reached = copy.deepcopy(model), time.perf_counter(), False
        layers = add_scaling(net, statistics, constraint)
        for epoch, _ in enumerate(epochs(net, layers, forget, config, rate_share), 1):
            probabilities_NC = probabilities(net, forget)
            poison, held = (
                accuracy(probabilities_NC, forget.labels),
                accuracy(probabilities(net, holdout), holdout.labels),
            )
            last = held < lowest or epoch == args.epochs
            if last or (poison <= mark and not reached):
                reached = reached or poison <= mark
                accuracies = [
                    poison,
                    accuracy(probabilities_NC, forget.clean),
                    accuracy(probabilities(net, retain), retain.labels),
                ]
                accuracies.append(accuracy(probabilities(net, test), test.labels))
                cells = " | ".join(f"{value:.3f}" for value in accuracies)
                print(f"| {rate_share:g} | {epoch} | {cells} | {time.perf_counter() - start:.0f} |", flush=True)
            if last:
                break
    return 0


if __name__ == "__main__":
    sys.exit(main())
