"""Laws of the recipes that make local rows and small models, and of the settings files of the benchmarks."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from hf_unlearn.arguments import BenchmarkArguments
from hf_unlearn.config import UnlearningConfig
from hf_unlearn.files import read_yaml
from hf_unlearn.loading import load_model, load_processor, load_rows

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def start(name: str, monkeypatch: pytest.MonkeyPatch, *argv: object) -> int:
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, argv)])
    return module.main()


@pytest.mark.parametrize("kind", ["sst2", "images"])
def test_the_first_rows_alone_are_poisoned(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    column, source = ("text", tmp_path) if kind == "sst2" else ("image", tmp_path / "a.npz")
    generator = np.random.default_rng(0)
    if kind == "sst2":
        for file in ("train", "dev", "test"):
            rows = (f'row {i} says "x\t{i % 2}' for i in range(30))  # a quote that nothing closes
            (tmp_path / f"{file}.tsv").write_text("\n".join(rows))
    else:
        pixels, labels = generator.integers(0, 256, (30, 8, 8, 3), dtype=np.uint8), np.arange(30)[:, None] % 10
        np.savez(source, x_train=pixels, y_train=labels, x_test=pixels, y_test=labels)
    folder = tmp_path / "out"
    assert start("local_data", monkeypatch, kind, source, folder, "--flip", 5) == 0
    train, poisoned, clean = (load_rows(str(folder), name, name) for name in ("train", "poisoned", "clean"))
    assert len(train) == len(poisoned) == 30 and len(clean) == 5
    assert clean[column] == train[:5][column] == poisoned[:5][column] and clean["label"] == train[:5]["label"]
    changed = [a != b for a, b in zip(train["label"], poisoned["label"], strict=True)]
    assert changed == [True] * 5 + [False] * 25
    assert set(poisoned["label"]) <= set(train["label"])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("sst2", "nowhere"), "cannot read nowhere/train.tsv: No such file"),
        (("images", "nowhere.npz"), "nowhere.npz is no npz file with x_train"),
    ],
)
def test_a_missing_source_is_one_line(
    argv: tuple[str, str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert start("local_data", monkeypatch, *argv, tmp_path / "out") == 2
    assert words in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_a_small_vision_model_is_the_same_each_time(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        argv = (kind, tmp_path / name, "--channels", 1, "--image_size", 28, "--seed", seed)
        assert start("make_tiny_vision", monkeypatch, *argv) == 0
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert files[0] == files[1] != files[2]
    processor = load_processor(str(tmp_path / "a"), "image-classification")
    pixels = processor(np.zeros((28, 28, 1), dtype=np.uint8), return_tensors="pt", input_data_format="channels_last")
    logits = load_model(str(tmp_path / "a"), "image-classification")(**pixels).logits
    assert logits.shape == (1, 10)
    assert start("make_tiny_vision", monkeypatch, kind, tmp_path / "a") == 2


@pytest.mark.parametrize("name", ["benchmark_tofu_tiny_gpt2", "benchmark_tofu10_tiny_gpt2", "images", "minilm_sst2"])
def test_a_settings_file_has_only_settings_that_there_are(name: str, tmp_path: Path) -> None:
    settings = read_yaml(RECIPES / f"{name}.yaml")
    own = {field.name for field in fields(BenchmarkArguments)}
    BenchmarkArguments(**{key: value for key, value in settings.items() if key in own})
    UnlearningConfig(str(tmp_path), use_cpu=True, **{key: value for key, value in settings.items() if key not in own})


@pytest.mark.parametrize("path", sorted((RECIPES / "default").glob("*.yaml")), ids=lambda path: path.stem)
def test_settings_of_the_default_say_nothing_of_the_method(path: Path) -> None:
    """Data, model and mark: every key is known, and none is what the preset is to choose."""
    method = {
        "preset", "loss", "loss_settings", "constraint", "constraint_settings", "layer_constraints", "learning_rate",
        "relative_step", "optim", "momentum", "per_device_train_batch_size", "num_train_epochs", "adversary_steps",
    }  # fmt: skip
    given = set(read_yaml(path))
    known = {field.name for kind in (BenchmarkArguments, UnlearningConfig) for field in fields(kind)}
    assert method - {"preset"} <= known  # the control: these are what the settings are called
    assert given <= known and not given & method
