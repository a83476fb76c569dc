"""The digits demonstration: a small vision transformer forgets a class, or single rows, of scikit-learn's digits."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import (
    PrinterCallback,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
    set_seed,
)

from hf_unlearn.constraints.registry import CONSTRAINTS
from hf_unlearn.core.files import check_output
from hf_unlearn.data.batches import PaddingCollator
from hf_unlearn.deletion.request import Request, clock
from hf_unlearn.errors import SettingsError
from hf_unlearn.evaluation.report import UnlearningReport
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.trainer.config import UnlearningConfig

Rows = list[dict[str, object]]


@dataclass(frozen=True)
class DigitsSplits:
    """Rows of one demonstration; `held_out` rows of the forgotten class are left out when a class is forgotten."""

    forget: Rows
    retain: Rows
    holdout: Rows


def digits_splits(forget: str, seed: int) -> DigitsSplits:
    """Split the 1797 digits 80:20 by class, and the training part by the request `class:C` or `rows:N`.

    Raises:
        SettingsError: Neither form, no such class, or more rows than there are.
    """
    images, labels = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 1, 8, 8) / 8 - 1).astype(np.float32)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=seed)
    kind, _, value = forget.partition(":")
    if kind not in ("class", "rows") or not value.isdigit():
        raise SettingsError(f"forget must be class:C (a digit) or rows:N (a number of rows), got {forget!r}")
    number = int(value)
    if kind == "class":
        if number > 9:
            raise SettingsError(f"there is no class {number}; the digits have classes 0 to 9")
        chosen, test = labels[train] == number, test[labels[test] != number]
    else:
        if not 0 < number < len(train):
            raise SettingsError(f"rows must be in 1 to {len(train) - 1}, got {number}")
        chosen = np.zeros(len(train), dtype=bool)
        chosen[np.random.default_rng(seed).choice(len(train), number, replace=False)] = True
    return DigitsSplits(*(_rows(pixels, labels, part) for part in (train[chosen], train[~chosen], test)))


def _rows(pixels: NDArray, labels: NDArray, indices: NDArray) -> Rows:
    return [{"pixel_values": pixels[i], "labels": int(labels[i])} for i in indices]


def train_vit(rows: Rows, seed: int, output_dir: str) -> ViTForImageClassification:
    """Train the demonstration's transformer (4 layers, width 64, patches of 2 x 2) from scratch."""
    set_seed(seed)
    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=128, num_labels=10,
    )  # fmt: skip
    model = ViTForImageClassification(config)
    args = TrainingArguments(
        output_dir, learning_rate=1e-3, num_train_epochs=30, per_device_train_batch_size=64, weight_decay=0.01,
        lr_scheduler_type="cosine", save_strategy="no", report_to="none", logging_strategy="no", seed=seed,
        disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=rows, data_collator=PaddingCollator())
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model


def run_digits(
    output_dir: str, forget: str, constraint: str | None, seed: int, overwrite: bool = False
) -> dict[str, UnlearningReport]:
    """Train, collect, forget, judge against a retrained model; one report for each constraint (`all` runs each).

    Settings are the defaults of `UnlearningConfig`; a class is forgotten to 2% accuracy, rows to that of held-out ones.

    Raises:
        SettingsError: A request that cannot be read.
        OutputError: `output_dir` is not empty and `overwrite` is false.
    """
    splits = digits_splits(forget, seed)
    by_class = forget.startswith("class")
    names = list(CONSTRAINTS) if constraint == "all" else [constraint or UnlearningConfig.constraint]
    configs = {name: _config(output_dir, name, by_class, seed, overwrite, len(names) > 1) for name in names}
    check_output(output_dir, overwrite)
    collator = PaddingCollator()
    timings: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        with clock(timings, "train original"):
            model = train_vit(splits.forget + splits.retain, seed, scratch)
        with clock(timings, "retrain"):
            retrained = train_vit(splits.retain, seed, scratch)
    with clock(timings, "collect"):
        rows = splits.forget + splits.retain
        full = collect_statistics(model, rows, collator=collator, batch_size=64, fisher=True, progress=False)
    request = Request(
        model,
        splits.forget,
        {"forget": splits.forget, "retain": splits.retain, "holdout": splits.holdout},
        statistics=full,
        retrained=retrained,
        processing_class=digits_processor(),
        collator=collator,
        source=f"scikit-learn digits, {forget}",
        timings=timings,
    )
    return {name: request.fulfil(config) for name, config in configs.items()}


def _config(output_dir: str, name: str, by_class: bool, seed: int, overwrite: bool, several: bool) -> UnlearningConfig:
    return UnlearningConfig(
        str(Path(output_dir) / name) if several else output_dir,
        overwrite_output_dir=overwrite,
        constraint=name,
        per_device_eval_batch_size=256,
        eval_on_start=True,
        forget_metric="accuracy",
        forget_target=0.02 if by_class else None,
        logging_strategy="steps",
        disable_tqdm=True,
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
    )


def digits_processor() -> ViTImageProcessorPil:
    """Takes 8 x 8 images with values 0 to 16 to what the model was trained on."""
    return ViTImageProcessorPil(
        do_resize=False, do_rescale=True, rescale_factor=1 / 16, do_normalize=True, image_mean=[0.5], image_std=[0.5]
    )
