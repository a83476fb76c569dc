"""Laws of the recipes that prepare rows and small models, of the benchmark settings, and of the experiments."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from helpers import tiny as cases
from helpers.paths import RECIPES
from hf_unlearn.constraints.binding import bind_constraints
from hf_unlearn.constraints.ridge import RidgeConstraint
from hf_unlearn.core.files import read_yaml
from hf_unlearn.data.batches import PaddingCollator
from hf_unlearn.data.splits import load_rows
from hf_unlearn.deletion.arguments import BenchmarkArguments
from hf_unlearn.deletion.request import DeletionRequest, RequestModels, RequestRows
from hf_unlearn.models.loading import load_model, load_processor
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.trainer.config import UnlearningConfig
from hf_unlearn.trainer.trainer import UnlearningTrainer

EXPERIMENTS = RECIPES / "experiments"


def recipe(name: str) -> ModuleType:
    if str(EXPERIMENTS) not in sys.path:
        sys.path.append(str(EXPERIMENTS))  # some experiments import others from their own folder
    path = RECIPES / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path if path.exists() else EXPERIMENTS / path.name)
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(name: str, monkeypatch: pytest.MonkeyPatch, *argv: object) -> int:
    module = recipe(name)
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
        (("images", "nowhere.npz"), "nowhere.npz is not an npz file with x_train"),
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


@pytest.mark.parametrize("path", sorted((RECIPES / "benchmarks").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_settings_file_has_only_settings_that_exist(path: Path, tmp_path: Path) -> None:
    settings = read_yaml(path)
    argument_names = {field.name for field in fields(BenchmarkArguments)}
    BenchmarkArguments(**{key: value for key, value in settings.items() if key in argument_names})
    UnlearningConfig(
        str(tmp_path), use_cpu=True, **{key: value for key, value in settings.items() if key not in argument_names}
    )


@pytest.mark.parametrize("path", sorted((RECIPES / "default").glob("*.yaml")), ids=lambda path: path.stem)
def test_settings_of_the_default_do_not_set_the_method(path: Path) -> None:
    """They set data, model and target: every key is known, and the preset chooses everything else."""
    method = set(
        "preset loss loss_settings constraint constraint_settings layer_constraints learning_rate relative_step optim "
        "momentum per_device_train_batch_size num_train_epochs adversary_steps".split()
    )
    names_in_file = set(read_yaml(path))
    known = {field.name for kind in (BenchmarkArguments, UnlearningConfig) for field in fields(kind)}
    assert method - {"preset"} <= known  # the control: these settings exist
    assert names_in_file <= known and not names_in_file & method


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options of a benchmark that takes seconds: 32 digits are learned, 8 of them are forgotten."""
    folder = tmp_path_factory.mktemp("digits")
    with pytest.MonkeyPatch.context() as patch:
        assert start("local_data", patch, "digits", "-", folder / "rows") == 0
        argv = ("vit", folder / "model", "--channels", 1, "--image_size", 8)
        assert start("make_tiny_vision", patch, *argv) == 0
    paths = {"model_name_or_path": "model", "dataset_name": "rows", "cache_dir": "cache"}
    options = (
        "--train train[0:32] --forget train[0:8] --holdout test[0:32] --fine_tune_epochs 12 --fine_tune_batch_size 16 "
        "--num_train_epochs 10 --use_cpu True"
    ).split()
    for flag, name in paths.items():
        options += [f"--{flag}", str(folder / name)]
    return ["images", str(RECIPES / "default" / "digits_rows.yaml"), *options]


@pytest.mark.slow
def test_the_default_is_compared_with_tuned_losses(
    digits: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    options = [*digits, "--seeds", "0,1", "--output_dir", tmp_path / "tuned", "--rates", "1e-9,4e-3"]
    options += ["--losses", "grad_ascent,kl_min", "--under", "none"]
    assert start("tuned", monkeypatch, *options) == 0
    table = capsys.readouterr().out
    table = table[table.index("|") :]
    lines = {line.split("|")[1].strip(): line for line in table.splitlines() if line.startswith("|")}
    assert "energy_ridge" in lines["ce_u"]
    assert "0.004 of 1" in lines["grad_ascent"]  # the other rate does not reach the mark
    assert "- kl_min, none: loss 'kl_min' needs retain rows" in table
    cells = {path: path.stat().st_mtime_ns for path in (tmp_path / "tuned" / "cells").iterdir()}
    assert len(cells) == 2 * 3 and (tmp_path / "tuned" / "frontier.png").is_file()
    assert start("tuned", monkeypatch, *options) == 0 and capsys.readouterr().out == table
    assert cells == {path: path.stat().st_mtime_ns for path in (tmp_path / "tuned" / "cells").iterdir()}

    assert start("floor", monkeypatch, tmp_path / "tuned") == 0
    pair, mean = capsys.readouterr().out.splitlines()
    assert pair.startswith("seeds 0 and 1: ") and 0 < float(pair.split(": ")[1]) == float(mean.split(": ")[1]) < 1
    assert start("floor", monkeypatch, tmp_path) == 2 and "retrained models of 0 seeds" in capsys.readouterr().err


@pytest.mark.slow
def test_variants_with_retain_rows_are_compared(
    digits: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert start("retain_data", monkeypatch, *digits, "--seeds", "0") == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    assert [line[0].removeprefix("| ") for line in lines] == [
        "original",
        "retrained",
        "no retain row",
        "collected again",
        "mixed batches",
        "both",
        "mixed batches alone",
    ]
    assert [line[1] for line in lines[2:]] == ["energy_ridge"] * 4 + ["none"]
    assert start("retain_data", monkeypatch, "images", "nowhere.yaml") == 2


@pytest.mark.slow
def test_two_sided_maps_are_compared_from_the_same_models(
    digits: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert start("two_sided", monkeypatch, *digits, "--seeds", "0") == 0
    lines = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    names = [line[0].removeprefix("| ") for line in lines]
    assert names == [
        "original",
        "retrained",
        "energy_ridge",
        "energy",
        "ridge",
        "kronecker",
        "joint",
        "ek-fac",
        "joint, cut",
        "ek-fac, cut",
    ]
    assert len({tuple(line[1:-1]) for line in lines[2:]}) > 4, "constraints made no difference"
    assert start("two_sided", monkeypatch, "images", "nowhere.yaml") == 2


def test_moments_are_those_of_single_rows_and_the_joint_map_is_the_minimum(tmp_path: Path) -> None:
    """Compare with gradients of single rows by autograd, and with the definition of the joint map in float64."""
    module, model, rows = recipe("two_sided"), cases.tiny_vit(), cases.image_rows(64)
    collator = PaddingCollator()
    statistics = collect_statistics(model, rows, collator=collator, fisher=True, progress=False)
    models = RequestModels(original=model, collator=collator)
    request = DeletionRequest(models=models, rows=RequestRows(forget=rows[:2], evaluation={"retain": rows}))
    moments = module.moments(request, statistics, 16)
    name = "vit.layers.0.mlp.fc1" if "vit.layers.0.mlp.fc1" in moments else next(iter(moments))
    weight = model.get_submodule(name).weight
    generator, total = torch.Generator().manual_seed(0), torch.zeros_like(weight)
    gram, fisher = statistics.gram_eigen(name), statistics.fisher_eigen(name)
    for start_at in range(0, len(rows), 16):
        logits = model(pixel_values=collator(rows[start_at : start_at + 16])["pixel_values"]).logits
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        for row_logits, label in zip(logits, drawn, strict=True):
            (gradient,) = torch.autograd.grad(-row_logits.log_softmax(-1)[label], weight, retain_graph=True)
            total += (fisher.vectors_II.float().T @ gradient @ gram.vectors_II.float()).square()
    torch.testing.assert_close(moments[name], total / len(rows), rtol=1e-3, atol=1e-9)

    trainer = UnlearningTrainer(
        model, UnlearningConfig(str(tmp_path), use_cpu=True), rows[:2], statistics=statistics, data_collator=collator
    )
    module.together(statistics, moments, False, False)(trainer)
    (bound,) = (part.bound for part in trainer.constrainer.weights if part.owner == name and part.bound is not None)
    assert abs(bound.kept_OI.mean().item() - 0.7) < 1e-3
    step_OI = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    a_II, s_OO = statistics.gram(name), statistics.fisher(name)
    kept = bound.kept_OI[0, 0].double()
    scale = fisher.values_I[0] * gram.values_I[0] * kept / (1 - kept)
    allowed = bound(step_OI.float()).double().requires_grad_()
    price = (allowed - step_OI).square().sum() + (s_OO @ allowed @ a_II * allowed).sum() / scale
    (slope,) = torch.autograd.grad(price, allowed)
    assert slope.abs().max() < 1e-3 * step_OI.abs().max()  # the control: the slope of the step itself is not zero
    step_OI.requires_grad_()
    (steep,) = torch.autograd.grad((s_OO @ step_OI @ a_II * step_OI).sum() / scale, step_OI)
    assert steep.abs().max() > 0.1


def test_statistics_collected_again_are_those_of_the_current_weights(tmp_path: Path) -> None:
    model, rows, collator = cases.tiny_vit(), cases.image_rows(6), PaddingCollator()
    config = UnlearningConfig(str(tmp_path), use_cpu=True, constraint="ridge")
    statistics = collect_statistics(model, rows, collator=collator, progress=False)
    trainer = UnlearningTrainer(model, config, rows[:2], statistics=statistics, data_collator=collator)
    models = RequestModels(original=model, collator=collator)
    request = DeletionRequest(models=models, rows=RequestRows(forget=rows[:2], retain=rows))
    before = [part.bound for part in trainer.constrainer.weights]
    with torch.no_grad():
        for part in trainer.constrainer.weights:
            part.parameter.mul_(1.5)
    recipe("retain_data").CollectAgain(request, trainer).on_epoch_end(config, None, None)
    now = bind_constraints(collect_statistics(model, rows, collator=collator, progress=False), RidgeConstraint())
    changed = []
    for part, old in zip(trainer.constrainer.weights, before, strict=True):
        if part.bound is not None and old is not None:
            step_OI = torch.ones_like(part.original_OI)
            torch.testing.assert_close(part.bound(step_OI), now[part.owner](step_OI))
            changed.append(not torch.allclose(old(step_OI), part.bound(step_OI), atol=1e-3))
    assert any(changed) and not all(changed)  # the first layer's inputs are the same as before


def test_content_tokens_are_compared_with_those_of_a_retrained_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = recipe("content_tokens")
    places = {"model_name_or_path": cases.requires_asset("stories260K"), "dataset_name": cases.requires_asset("tofu")}
    rows = {"train": "full[0:8]", "forget": "full[0:2]", "max_length": 128, "use_cpu": True, "disable_tqdm": True}
    rows["cache_dir"] = tmp_path
    tuning = {"fine_tune": True, "fine_tune_epochs": 12, "fine_tune_learning_rate": 3e-3, "retrained": "auto"}
    flags = [str(word) for name, value in (places | rows | tuning).items() for word in (f"--{name}", value)]
    assert experiment.main(flags) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("2 rows, ")
    assert [line.split(":")[0] for line in lines[1:]] == ["checkpoint before fine-tuning", "short context"]
    assert all(0 < float(line.split()[-1]) <= 1 for line in lines[1:])
    assert experiment.main([*flags, "--retrained", "none"]) == 2
    assert "compares with a retrained model" in capsys.readouterr().err
