"""Laws of the digits demonstration: honest splits, and the results that the README promises."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from transformers import AutoImageProcessor, ViTForImageClassification

from hf_unlearn.cli import main
from hf_unlearn.data.row_identity import row_hash
from hf_unlearn.demo import digits
from hf_unlearn.demo.digits import DigitsSplits, digits_processor, digits_splits
from hf_unlearn.errors import SettingsError
from hf_unlearn.evaluation.report import UnlearningReport

ROWS, TRAIN = 1797, 1437


def parts(splits: DigitsSplits) -> tuple[list[Any], list[Any], list[Any]]:
    return splits.forget, splits.retain, splits.holdout


def keys(rows: list[Any]) -> list[bytes]:
    return [row_hash(row) + bytes([row["labels"]]) for row in rows]


@pytest.mark.parametrize("forget", ["class:3", "rows:140"])
def test_splits_are_parts_of_the_digits_and_share_no_row(forget: str) -> None:
    images, labels = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 1, 8, 8) / 8 - 1).astype(np.float32)
    known = {k for k in keys([{"pixel_values": p, "labels": int(y)} for p, y in zip(pixels, labels, strict=True)])}
    assert len(known) == ROWS  # so that a row's content says which row it is
    found = [keys(part) for part in parts(digits_splits(forget, 0))]
    together = [key for part in found for key in part]
    assert len(together) == len(set(together)) and set(together) <= known
    assert len(found[0]) + len(found[1]) == TRAIN


def test_a_class_request_takes_every_training_row_of_the_class_and_judges_on_the_others() -> None:
    _, labels = load_digits(return_X_y=True)
    for wanted in (0, 3, 9):
        splits = digits_splits(f"class:{wanted}", 0)
        assert {row["labels"] for row in splits.forget} == {wanted}
        others = set(range(10)) - {wanted}
        assert {row["labels"] for row in splits.retain} == {row["labels"] for row in splits.holdout} == others
        share = len(splits.forget) / (labels == wanted).sum()
        assert 0.78 < share < 0.82  # stratified
        assert ROWS - TRAIN - len(splits.holdout) == (labels == wanted).sum() - len(splits.forget)


def test_a_row_request_takes_so_many_rows_of_any_class() -> None:
    splits = digits_splits("rows:140", 0)
    assert [len(part) for part in parts(splits)] == [140, TRAIN - 140, ROWS - TRAIN]
    assert {row["labels"] for row in splits.forget} == set(range(10))
    assert [len(part) for part in parts(digits_splits("rows:1", 0))] == [1, TRAIN - 1, ROWS - TRAIN]
    assert len(digits_splits(f"rows:{TRAIN - 1}", 0).retain) == 1


def test_a_seed_gives_the_same_splits_and_another_one_others() -> None:
    first, again, other = (digits_splits("rows:140", seed) for seed in (0, 0, 1))
    for left, right in zip(parts(first), parts(again), strict=True):
        assert keys(left) == keys(right)
    assert set(keys(first.forget)) != set(keys(other.forget)) and set(keys(first.holdout)) != set(keys(other.holdout))


@pytest.mark.parametrize(
    ("forget", "message"),
    [
        ("class:10", "class 10 does not exist"),
        ("class:-1", "class:C"),
        ("class:", "class:C"),
        ("class:x", "class:C"),
        ("digit:3", "class:C"),
        ("", "class:C"),
        ("3", "class:C"),
        ("rows:0", "1 to 1436"),
        ("rows:1437", "1 to 1436"),
        ("rows:2.5", "rows:N"),
    ],
)
def test_a_request_that_cannot_be_read_is_refused(forget: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        digits_splits(forget, 0)


def test_the_processor_makes_of_an_image_what_the_model_was_trained_on() -> None:
    images, _ = load_digits(return_X_y=True)
    rows = {k for split in parts(digits_splits("rows:140", 0)) for k in (row_hash(row) for row in split)}
    for image in images[:5].reshape(-1, 8, 8):
        made = digits_processor()(image[..., None], input_data_format="channels_last", return_tensors="np")
        assert row_hash({"pixel_values": made["pixel_values"][0]}) in rows


@pytest.fixture
def one_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """The original is trained; it also stands in for the retrained model, which is not evaluated."""
    train, models = digits.train_vit, []

    def first_only(rows: Any, seed: int, output_dir: str) -> ViTForImageClassification:
        if not models:
            models.append(train(rows, seed, output_dir))
        return copy.deepcopy(models[0])

    monkeypatch.setattr(digits, "train_vit", first_only)


def accuracies(report: UnlearningReport) -> dict[tuple[str, str], float]:
    return {(m.split, m.model): m.value for m in report.metrics if m.name == "accuracy"}


def demo(out: Path, *flags: str) -> UnlearningReport:
    assert main(["demo", "--output_dir", str(out), *flags]) == 0
    return UnlearningReport.load(out)


def test_the_demonstration_forgets_a_class_and_keeps_the_others(
    one_training: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    report = demo(out, "--constraint", "kronecker", "--forget", "class:3", "--seed", "0")
    found = accuracies(report)
    assert found["forget", "original"] > 0.99 and found["retain", "original"] > 0.99
    assert found["forget", "unlearned"] <= 0.02
    assert found["retain", "unlearned"] >= found["retain", "original"] - 0.005
    assert found["holdout", "unlearned"] >= found["holdout", "original"] - 0.01
    table = capsys.readouterr().out
    assert "retrained" in table and "kronecker" in table and str(out) in table
    assert (out / "README.md").is_file() and list((out / "plots").glob("*.png"))

    model = ViTForImageClassification.from_pretrained(out).eval()
    processor = AutoImageProcessor.from_pretrained(out)
    splits = digits_splits("class:3", 0)
    for name, rows in (("forget", splits.forget), ("holdout", splits.holdout)):
        raw = [(np.asarray(row["pixel_values"])[0] + 1) * 8 for row in rows]  # values 0 to 16, as they are published
        pixels = processor([image[..., None] for image in raw], input_data_format="channels_last", return_tensors="pt")[
            "pixel_values"
        ]
        with torch.no_grad():
            right = model(pixel_values=pixels).logits.argmax(-1) == torch.tensor([row["labels"] for row in rows])
        assert right.double().mean().item() == pytest.approx(found[name, "unlearned"], abs=1e-6)


@pytest.mark.slow
def test_the_demonstration_makes_forgotten_rows_look_like_rows_never_seen(tmp_path: Path) -> None:
    found = accuracies(demo(tmp_path / "demo", "--forget", "rows:140", "--seed", "1"))
    assert abs(found["forget", "unlearned"] - found["holdout", "unlearned"]) <= 0.03
    assert found["retain", "unlearned"] >= found["retain", "original"] - 0.015
    assert found["forget", "original"] > found["forget", "unlearned"]
    assert abs(found["forget", "retrained"] - found["holdout", "retrained"]) <= 0.05  # what it is to look like
