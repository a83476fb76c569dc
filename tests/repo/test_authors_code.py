"""Compare hf_unlearn with the unchanged code of the PGU authors on the same weights and batches.

`PGU_AUTHORS_CODE` names a checkout of github.com/hnanhtuan/projected_gradient_unlearning; the tests are skipped without
it (`helpers/authors_code.py` documents how it is run). Equal up to rounding: Grams, retain Grams, bases, projections,
and the weights after ten steps. Different on purpose, and tested here:
- the rank: `unlearn.py` keeps the directions whose cumulated share is *at most* the threshold, `unlearn_class.py` one
  more; here it is the smallest rank that reaches the threshold, which is that of `unlearn_class.py`;
- convolutions with a stride: theirs unfold every position, here the ones that the convolution reads;
- weights that are not projected: theirs zeroes their gradient, here they are frozen;
- below `offset` their first loss term is still active, here it is zero (`tests/losses/test_losses.py`).
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from helpers.paths import HELPERS
from hf_unlearn.constraints.binding import bind_constraints
from hf_unlearn.constraints.energy import EnergyConstraint
from hf_unlearn.constraints.step_constrainer import constrain_optimizer
from hf_unlearn.data.batches import PaddingCollator
from hf_unlearn.losses import build_loss
from hf_unlearn.models.modes import hold_norm_statistics
from hf_unlearn.models.trainable import freeze_unprotected
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.statistics.eigen import leading_basis, rank_for_energy
from hf_unlearn.statistics.retain_statistics import RetainStatistics

CODE = os.environ.get("PGU_AUTHORS_CODE", "")
pytestmark = pytest.mark.skipif(
    not Path(CODE, "unlearn.py").is_file(), reason="set PGU_AUTHORS_CODE to a checkout of the PGU authors' code"
)
ENERGY, START, END, EPOCHS, WIDTH = 0.9, 0.1, 0.05, 3, 0.125
STRIDED = ("features.2.0", "features.6.0")
FULL, FORGET, BATCH = 250, 640, 128  # five batches an epoch; their first epoch takes no step


def theirs_name(layer: str) -> str:
    """`features.0.0 -> features[0][0]`."""
    head, *rest = layer.split(".")
    return head + "".join(f"[{part}]" for part in rest)


@dataclass(frozen=True)
class Run:
    """The output of their code, its inputs, and the statistics of hf_unlearn for the same rows."""

    folder: Path
    model: nn.Module
    forget: dict[str, Tensor]
    full: RetainStatistics
    retain: RetainStatistics

    def svd(self, kind: str, layer: str) -> tuple[Tensor, Tensor]:
        svd = load_file(self.folder / "svd.safetensors")
        return svd[f"{kind}.{theirs_name(layer)}.U"], svd[f"{kind}.{theirs_name(layer)}.S"]

    def gram(self, kind: str, layer: str) -> Tensor:
        u_IK, s_K = self.svd(kind, layer)
        return (u_IK * s_K.square()) @ u_IK.T

    @property
    def comparable(self) -> list[str]:
        return [layer for layer in self.full.layers if layer not in STRIDED]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("authors")
    torch.manual_seed(0)
    labels = torch.randint(0, 10, (FORGET + FULL,))
    images = torch.randn(10, 3, 32, 32)[labels] + torch.randn(FORGET + FULL, 3, 32, 32)
    model = trained_allcnn(images, labels)
    forget = {"images": images[:FORGET], "labels": labels[:FORGET]}
    save_file({"images": images, "labels": labels}, folder / "full.safetensors")
    save_file(forget, folder / "forget.safetensors")
    save_file(model.state_dict(), folder / "weights.safetensors")
    write_settings(folder)
    program = [sys.executable, str(HELPERS / "authors_code.py"), CODE, str(folder)]
    done = subprocess.run(program, capture_output=True, text=True, env={**os.environ, "MPLBACKEND": "Agg"})
    assert done.returncode == 0, done.stderr[-2000:]
    collect = partial(collect_statistics, model, batch_size=125, collator=PaddingCollator(), progress=False)
    rows = [{"pixel_values": x, "labels": int(y)} for x, y in zip(images, labels, strict=True)]
    full = collect(rows)
    return Run(folder, model, forget, full, full - collect(rows[:FORGET]))


class AllCNN(nn.Module):
    """Their net with their names: two blocks of the sequence do nothing (dropout, if there were any)."""

    def __init__(self) -> None:
        super().__init__()
        narrow, wide = int(96 * WIDTH), int(192 * WIDTH)
        plan = {
            0: (3, narrow, 3, 1),
            1: (narrow, narrow, 3, 1),
            2: (narrow, wide, 3, 2),
            4: (wide, wide, 3, 1),
            5: (wide, wide, 3, 1),
            6: (wide, wide, 3, 2),
            8: (wide, wide, 3, 1),
            9: (wide, wide, 1, 1),
        }
        blocks: list[nn.Module] = [nn.Identity() for _ in range(10)]
        for index, (before, after, kernel, stride) in plan.items():
            conv = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
            blocks[index] = nn.Sequential(conv, nn.BatchNorm2d(after), nn.ReLU())
        self.features = nn.Sequential(*blocks, nn.AvgPool2d(8), nn.Flatten())
        self.classifier = nn.Sequential(nn.Linear(wide, 10))

    def forward(self, pixel_values: Tensor, **ignored: Any) -> Tensor:
        return self.classifier(self.features(pixel_values))


def trained_allcnn(images: Tensor, labels: Tensor) -> nn.Module:
    model = AllCNN()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(2):
        for part in torch.arange(len(images)).split(89):
            optimizer.zero_grad()
            F.cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()
    return model.eval()


def write_settings(folder: Path) -> None:
    kept = {"default": ENERGY} | {theirs_name(layer): 1.0 for layer in STRIDED}  # 1.0: they leave the layer alone
    unlearn = {
        "model": "allcnn",
        "dataset": "cifar10",
        "learned_config": "learned/config.yaml",
        "retained_var": kept,
        "unlearn_steps": [{"forget_range": [[0, 1]]}],
        "start_lr": START,
        "end_lr": END,
        "num_epochs": EPOCHS,
        "loss1_w": 1.0,
        "loss2_w": 0.2,
        "wd": 0,
        "offset": 0.05,
        "save_model": 1,
    }
    rows = {"name": "datasets.Rows", "root": str(folder), "params": {"data_set": "train"}}
    learned = {
        "params": {"image_size": 32},
        "dataset": {"train": rows, "val": {**rows, "params": {"data_set": "val"}}},
        "net": {"backbone": "backbone.AllCNN", "params": {"filters_percentage": WIDTH}},
    }
    (folder / "unlearn.yaml").write_text(yaml.safe_dump(unlearn))
    (folder / "learned.yaml").write_text(yaml.safe_dump(learned))


def far(a: Tensor, b: Tensor) -> float:
    """Relative difference in the Frobenius norm."""
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", ["full", "retain"])
def test_the_grams_are_theirs(kind: str, run: Run) -> None:
    statistics = getattr(run, kind)
    for layer in run.comparable:
        assert far(statistics.gram(layer) * statistics.positions[layer], run.gram(kind, layer)) < 1e-12, layer
    assert far(run.gram("retain", "classifier.0"), run.gram("full", "classifier.0")) > 0.1


def test_a_strided_convolution_is_unfolded_at_the_positions_that_it_reads(run: Run) -> None:
    """Theirs unfold with stride 1: four times as many patches, most of which this layer never sees."""
    for layer in STRIDED:
        conv, seen = run.model.get_submodule(layer), []
        handle = conv.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0].detach()))
        full = load_file(run.folder / "full.safetensors")["images"]
        with torch.no_grad():
            run.model(full)
        handle.remove()
        for stride, gram_II in ((2, run.full.gram(layer) * run.full.positions[layer]), (1, run.gram("full", layer))):
            patches_NI = F.unfold(seen[0].double(), 3, padding=1, stride=stride).transpose(1, 2).flatten(0, 1)
            assert far(patches_NI.T @ patches_NI, gram_II) < 1e-6


def shares(run: Run, layer: str) -> Tensor:
    """Cumulated shares of the singular values of their retain Gram."""
    _, s_K = run.svd("retain", layer)
    return s_K.cumsum(0) / s_K.sum()


def theirs_rank(run: Run, layer: str) -> int:
    """Of the projection that they applied."""
    return round(load_file(run.folder / "svd.safetensors")[f"projection.{theirs_name(layer)}"].trace().item())


def test_the_rank_is_one_more_than_theirs(run: Run) -> None:
    for layer in run.comparable:
        mine = rank_for_energy(run.retain.gram_eigen(layer).values_I, ENERGY, "singular_values")
        assert mine == theirs_rank(run, layer) + 1
        assert shares(run, layer)[mine - 1] >= ENERGY > shares(run, layer)[mine - 2]


def same_rank(run: Run, layer: str) -> EnergyConstraint:
    """The constraint of their rank: its threshold is halfway between the shares of that rank and the one before."""
    rank = theirs_rank(run, layer)
    before, reached = torch.cat([torch.zeros(1), shares(run, layer)])[rank - 1 : rank + 1].tolist()
    return EnergyConstraint((before + reached) / 2, "singular_values")


def test_the_bases_and_projections_are_theirs(run: Run) -> None:
    for layer in run.comparable:
        chosen = same_rank(run, layer)
        basis_IK = leading_basis(run.retain.gram(layer), chosen.energy, "singular_values")
        u_II, _ = run.svd("retain", layer)
        rank = theirs_rank(run, layer)
        assert basis_IK.shape[1] == rank
        core_IK = u_II[:, :rank]
        outside_IK = basis_IK - core_IK @ (core_IK.T @ basis_IK)
        assert torch.linalg.matrix_norm(outside_IK, 2) < 1e-9, layer  # sine of the largest principal angle
        if rank < len(u_II):  # the next direction is at a right angle to all of them
            assert torch.linalg.svdvals(basis_IK.T @ u_II[:, 1 : rank + 1]).min() < 1e-3


def steps(run: Run, constraint: Any) -> dict[str, Tensor]:
    """Ten plain SGD steps in their order, at their learning rates: two epochs of five batches."""
    model = trained_copy(run)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[0] in run.comparable)
    freeze_unprotected(model, run.comparable)
    model.train()
    hold_norm_statistics(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=START)
    constrain_optimizer(optimizer, model, run.retain, constraint)
    loss, lowest = build_loss("pgu", {"offset": 0.05, "entropy_weight": 0.2}), 1.0
    for epoch in range(1, EPOCHS):
        optimizer.param_groups[0]["lr"] = START * (END / START) ** (epoch / EPOCHS)
        for images, labels in zip(run.forget["images"].split(BATCH), run.forget["labels"].split(BATCH), strict=True):
            optimizer.zero_grad()
            loss(model, {"forget": {"pixel_values": images, "labels": labels}}).backward()
            lowest = min(lowest, model(images).softmax(-1).gather(1, labels[:, None]).min().item())
            optimizer.step()
    assert lowest > 0.05  # below it the losses differ
    return dict(model.state_dict())


def trained_copy(run: Run) -> nn.Module:
    for parameter in run.model.parameters():
        parameter.requires_grad_(True)
    run.model.load_state_dict(load_file(run.folder / "weights.safetensors"))
    return run.model


def test_ten_steps_end_at_their_weights(run: Run) -> None:
    before, theirs = (load_file(run.folder / f"{name}.safetensors") for name in ("weights", f"epoch_{EPOCHS - 1}"))
    mine = steps(run, {layer: same_rank(run, layer) for layer in run.comparable} | {"*": None})
    for layer in run.comparable:
        name = f"{layer}.weight"
        assert (theirs[name] - before[name]).norm() > 1e-4 * before[name].norm(), layer
        assert far(mine[name] - before[name], theirs[name] - before[name]) < 1e-3, layer
        assert far(mine[name], theirs[name]) < 1e-5, layer  # float32
    for name in set(before) - {f"{layer}.weight" for layer in run.comparable}:
        assert torch.equal(theirs[name], before[name]) and torch.equal(mine[name], before[name]), name


def test_without_the_constraint_ten_steps_end_elsewhere(run: Run) -> None:
    before, theirs = (load_file(run.folder / f"{name}.safetensors") for name in ("weights", f"epoch_{EPOCHS - 1}"))
    free = steps(run, None)
    name = "features.5.0.weight"
    assert far(free[name] - before[name], theirs[name] - before[name]) > 0.1


def test_their_projection_is_the_one_that_is_applied(run: Run) -> None:
    bound = bind_constraints(run.retain, {layer: same_rank(run, layer) for layer in run.comparable} | {"*": None})
    projections = load_file(run.folder / "svd.safetensors")
    for layer in run.comparable:
        p_II = projections[f"projection.{theirs_name(layer)}"]
        step_OI = torch.randn(7, len(p_II))
        torch.testing.assert_close(bound[layer](step_OI), step_OI - step_OI @ p_II, atol=1e-5, rtol=1e-4)
