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
from hf_unlearn.core.text import ShortRepr
from hf_unlearn.data.batches import PaddingCollator
from hf_unlearn.deletion.fulfil import fulfil_request_under
from hf_unlearn.deletion.request import DeletionRequest, RequestModels, RequestRows
from hf_unlearn.deletion.timing import timed
from hf_unlearn.errors import SettingsError
from hf_unlearn.evaluation.report import UnlearningReport
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.trainer.config import UnlearningConfig

Rows = list[dict[str, NDArray | int]]


@dataclass(frozen=True, repr=False)
class DigitsSplits(ShortRepr):
    """The rows of one demonstration.

    Attributes:
        forget: Rows to forget.
        retain: The other training rows.
        holdout: Rows that no model was trained on. If a class is forgotten, they have no row of it.
    """

    forget: Rows
    retain: Rows
    holdout: Rows


def digits_splits(forget: str, seed: int) -> DigitsSplits:
    """Split the 1797 digits 80:20, stratified by class, and the training part by a request.

    Args:
        forget: `class:C` for all training rows of a class, or `rows:N` for N random training rows.
        seed: Seed of the splits.

    Raises:
        SettingsError: A request of another form, an unknown class, or more rows than there are.
    """
    images, labels = load_digits(return_X_y=True)
    pixels = (images.reshape(-1, 1, 8, 8) / 8 - 1).astype(np.float32)
    train, test = train_test_split(np.arange(len(labels)), test_size=0.2, stratify=labels, random_state=seed)
    unit, _, value = forget.partition(":")
    if unit not in ("class", "rows") or not value.isdigit():
        raise SettingsError(f"forget must be class:C (a digit) or rows:N (a number of rows), got {forget!r}")
    number = int(value)
    if unit == "class":
        if number > 9:
            raise SettingsError(f"class {number} does not exist; the digits have classes 0 to 9")
        chosen, test = labels[train] == number, test[labels[test] != number]
    else:
        if not 0 < number < len(train):
            raise SettingsError(f"rows must be in 1 to {len(train) - 1}, got {number}")
        chosen = np.zeros(len(train), dtype=bool)
        chosen[np.random.default_rng(seed).choice(len(train), number, replace=False)] = True
    return DigitsSplits(*(_rows(pixels, labels, indices) for indices in (train[chosen], train[~chosen], test)))


def _rows(pixels: NDArray, labels: NDArray, indices: NDArray) -> Rows:
    return [{"pixel_values": pixels[i], "labels": int(labels[i])} for i in indices]


def train_vit(rows: Rows, seed: int, output_dir: str) -> ViTForImageClassification:
    """Train the demonstration's vision transformer (4 layers, width 64, patches of 2 x 2) from scratch.

    Args:
        rows: Rows to train on.
        seed: Seed of the weights and of the order of rows.
        output_dir: Folder that `Trainer` may use; nothing is saved there.
    """
    set_seed(seed)
    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=10,
    )
    model = ViTForImageClassification(config)
    args = TrainingArguments(
        output_dir,
        learning_rate=1e-3,
        num_train_epochs=30,
        per_device_train_batch_size=64,
        weight_decay=0.01,
        lr_scheduler_type="cosine",
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        seed=seed,
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(model, args, train_dataset=rows, data_collator=PaddingCollator())
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return model


def run_digits(
    output_dir: str, forget: str, constraint: str | None, seed: int, overwrite: bool = False
) -> dict[str, UnlearningReport]:
    """Train, collect statistics, forget, and compare with a retrained model.

    Hyper-parameters are the defaults of `UnlearningConfig`. A class is forgotten down to 2% accuracy, rows down to the
    accuracy of held-out rows.

    Args:
        output_dir: Output folder; several constraints get a folder each inside it.
        forget: See `digits_splits`.
        constraint: Name of a constraint, `all` for each of them, or None for the default.
        seed: Seed of the splits and of training.
        overwrite: Replace what is in the output folder.

    Returns:
        A report for each constraint.

    Raises:
        SettingsError: A malformed request, or an unknown constraint.
        OutputError: `output_dir` is not empty and `overwrite` is false.
    """
    splits = digits_splits(forget, seed)
    names = list(CONSTRAINTS) if constraint == "all" else [constraint or UnlearningConfig.constraint]
    target = 0.02 if forget.startswith("class") else None
    configs = {name: _config(_folder(output_dir, name, names), name, target, seed, overwrite) for name in names}
    check_output(output_dir, overwrite)
    finished = fulfil_request_under(_request(splits, forget, seed), configs)
    return {name: result.report for name, result in finished.items()}


def _request(splits: DigitsSplits, forget: str, seed: int) -> DeletionRequest:
    """Train the original and the retrained model, and collect statistics of the training set."""
    collator, train = PaddingCollator(), splits.forget + splits.retain
    timings: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        with timed(timings, "train original"):
            original = train_vit(train, seed, scratch)
        with timed(timings, "retrain"):
            retrained = train_vit(splits.retain, seed, scratch)
    with timed(timings, "collect"):
        statistics = collect_statistics(original, train, collator=collator, batch_size=64, fisher=True, progress=False)
    return DeletionRequest(
        models=RequestModels(
            original=original, retrained=retrained, processing_class=digits_processor(), collator=collator
        ),
        rows=RequestRows(
            forget=splits.forget,
            evaluation={"retain": splits.retain, "holdout": splits.holdout},
            source=f"scikit-learn digits, {forget}",
        ),
        statistics=statistics,
        timings=timings,
    )


def _folder(output_dir: str, name: str, names: list[str]) -> str:
    """Return the output folder of a constraint: one of several has a folder of its own."""
    return str(Path(output_dir) / name) if len(names) > 1 else output_dir


def _config(output_dir: str, constraint: str, target: float | None, seed: int, overwrite: bool) -> UnlearningConfig:
    return UnlearningConfig(
        output_dir,
        overwrite_output_dir=overwrite,
        constraint=constraint,
        per_device_eval_batch_size=256,
        eval_on_start=True,
        forget_metric="accuracy",
        forget_target=target,
        logging_strategy="steps",
        disable_tqdm=True,
        seed=seed,
        use_cpu=not torch.cuda.is_available(),
    )


def digits_processor() -> ViTImageProcessorPil:
    """Return the processor that turns 8 x 8 images with values 0 to 16 into the inputs the model was trained on."""
    return ViTImageProcessorPil(
        do_resize=False, do_rescale=True, rescale_factor=1 / 16, do_normalize=True, image_mean=[0.5], image_std=[0.5]
    )
