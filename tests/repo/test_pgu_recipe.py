"""Laws of the experiments with the scenarios of PGU.

The settings are those of the authors, the nets have the published shapes, and a small run of each scenario forgets,
evaluates, and ends with a table. The images are enlarged digits of scikit-learn.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from helpers.paths import RECIPES
from hf_unlearn.constraints.energy import EnergyConstraint
from hf_unlearn.core.files import read_yaml
from hf_unlearn.trainer.config import UnlearningConfig

EXPERIMENTS = RECIPES / "experiments"
SETTINGS = [
    EXPERIMENTS / f"{name}.yaml"
    for name in ("pgu_samples", "pgu_class", "pgu_poison", "image_rows", "image_class", "image_poison")
]


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    spec = importlib.util.spec_from_file_location("pgu", EXPERIMENTS / "pgu.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "pgu", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as 16 x 16 colour images, in the format of the CIFAR-10 file."""
    images, labels = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 8, 8, 1) * 255 / 16).astype(np.uint8)
    pixels = pixels.repeat(2, axis=1).repeat(2, axis=2).repeat(3, axis=3)
    path = tmp_path_factory.mktemp("images") / "digits.npz"
    np.savez(path, x_train=pixels[:1000], y_train=labels[:1000], x_test=pixels[1000:], y_test=labels[1000:])
    return path


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.stem)
def test_a_settings_file_is_a_configuration(path: Path, tmp_path: Path) -> None:
    config = UnlearningConfig(str(tmp_path), **read_yaml(path), use_cpu=True)
    if path.stem.startswith("pgu"):
        assert isinstance(constraint := config.build_constraint(), EnergyConstraint)
        assert constraint.spectrum == "singular_values" and constraint.energy in (0.9, 0.95)
        assert config.momentum == config.weight_decay == 0 and not config.relative_step
        assert (config.learning_rate, config.final_learning_rate) in ((0.05, 0.01), (0.1, 0.05))


@pytest.mark.parametrize("name, widths", [("allcnn", {27, 864, 1728, 192}), ("smallvgg", {27, 1152, 2304, 8192, 512})])
def test_the_nets_have_the_published_shapes(name: str, widths: set[int], recipe: ModuleType) -> None:
    model = recipe.NETS[name]().eval()
    weights = [p for p in model.parameters() if p.ndim > 1]
    assert {p[0].numel() for p in weights} == widths
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def start(recipe: ModuleType, monkeypatch: pytest.MonkeyPatch, *argv: object) -> int:
    monkeypatch.setattr(sys, "argv", ["pgu.py", *map(str, argv)])
    return recipe.main()


def few(path: Path, folder: Path, **changes: Any) -> Path:
    """Copy a settings file with few epochs and the other settings unchanged."""
    import yaml

    target = folder / path.name
    target.write_text(yaml.safe_dump(read_yaml(path) | {"num_train_epochs": 3} | changes))
    return target


@pytest.mark.parametrize(
    "task, requests", [pytest.param("samples", 4, marks=pytest.mark.slow), ("class", 1), ("poison", 1)]
)
def test_a_small_run_of_each_scenario_ends_with_a_table(
    task: str,
    requests: int,
    recipe: ModuleType,
    npz: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = [few(EXPERIMENTS / f"{name}.yaml", tmp_path) for name in recipe.SCENARIOS[task].settings]
    monkeypatch.setattr(recipe, "PAPER", 10000)  # so that more than one row of each class is forgotten
    sizes = "--images 500 --epochs 3 --width 0.0625 --net smallvgg --shadows 1".split()
    argv = (task, npz, "--settings", *files, *sizes, "--output_dir", tmp_path / "out")
    assert start(recipe, monkeypatch, *argv) == 0
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    names = [line.split("|")[2].strip() for line in table[2:]]
    for name in ("original", "retrained", *(path.stem for path in files)):
        assert names.count(name) == requests
    result = recipe.read(tmp_path / "out")
    for model in result["models"]:
        assert 0 <= model["forget"] <= 1 and ("clean" in model) == (task == "poison")
        assert (model["entropy_distance"] == 0) == (model["model"] == "retrained")
        assert ("taken_for_unseen" in model) == (model["request"] == 1)
    assert start(recipe, monkeypatch, "table", tmp_path / "out", tmp_path / "out") == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")] == table
    files_before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.safetensors")}
    assert len(files_before) == 1 + requests + 2


def test_an_unfinished_run_has_no_table(recipe: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert start(recipe, monkeypatch, "table", tmp_path) == 2


def test_requests_are_balanced_and_disjoint(recipe: ModuleType, npz: Path) -> None:
    train, holdout, test = recipe.load(npz, 500, 0)
    assert (np.bincount(train.labels) == 50).all() and len(holdout) + len(test) > 100
    requests = recipe.four_requests(train, 0.05)
    assert [len(indices) for indices in requests] == [50] * 4 and len(np.unique(np.concatenate(requests))) == 200
    for indices in requests:
        assert (np.bincount(train.labels[indices]) == 5).all()
    flipped = train.flipped(0)
    assert (flipped.labels != train.labels).all() and (flipped.clean == train.labels).all()


def test_the_entropy_distance_is_that_of_shifted_distributions(recipe: ModuleType) -> None:
    flat, sure = np.full((4, 10), 0.1), np.eye(10)[:4]
    assert recipe.entropy_distance(flat, flat) == 0
    np.testing.assert_allclose(recipe.entropy_distance(flat, sure), np.log(np.log(10)) - recipe.LOWEST)
