"""A loss defined outside the package, in this file, trains a model without any edit in the package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor

from helpers.tiny import text_rows, tiny_llama
from hf_unlearn.data.batches import PaddingCollator
from hf_unlearn.errors import SettingsError
from hf_unlearn.evaluation.row_scores import score_rows
from hf_unlearn.losses import LOSSES, build_loss, register_loss
from hf_unlearn.models.forward import Predictions
from hf_unlearn.trainer.config import UnlearningConfig
from hf_unlearn.trainer.trainer import UnlearningTrainer

NAME = "relative_probability_of_this_test"


@pytest.fixture
def loss_from_outside() -> Iterator[str]:
    @register_loss(NAME, unit="row", reads_original="nll", alpha=1.0)
    def relative_probability(predictions: Predictions, original: Predictions, *, power: float = 1.0) -> Tensor:
        """Return the probability of each answer relative to the original model's, to a power."""
        log_ratio_L = original.nll_L - predictions.nll_L
        return (power * predictions.sum_by_row(log_ratio_L)).exp()

    yield NAME
    LOSSES.remove(NAME)


def trainer_with(loss: str, folder: Path, settings: dict[str, float] | None = None) -> UnlearningTrainer:
    args = UnlearningConfig(
        str(folder),
        use_cpu=True,
        disable_tqdm=True,
        max_steps=3,
        learning_rate=1e-2,
        constraint="none",
        loss=loss,
        loss_settings=settings,
        per_device_train_batch_size=4,
    )
    return UnlearningTrainer(tiny_llama(), args, text_rows(4), text_rows(6, 1))


def test_a_loss_from_outside_trains_a_model_by_its_name(loss_from_outside: str, tmp_path: Path) -> None:
    trainer = trainer_with(loss_from_outside, tmp_path, {"power": 0.5})
    assert trainer.loss.settings == {"power": 0.5} and trainer.loss.alpha == 1.0
    before = score_rows(trainer.model, text_rows(4), PaddingCollator()).probability.mean()
    trainer.train()
    assert score_rows(trainer.model, text_rows(4), PaddingCollator()).probability.mean() < before


def test_the_package_does_not_know_the_loss_once_it_is_removed(tmp_path: Path) -> None:
    assert NAME not in LOSSES
    with pytest.raises(SettingsError, match=f"unknown loss {NAME!r}"):
        build_loss(NAME)
    with pytest.raises(SettingsError, match=f"unknown loss {NAME!r}"):
        trainer_with(NAME, tmp_path)


def test_two_losses_cannot_have_one_name() -> None:
    with pytest.raises(SettingsError, match="loss 'npo' is registered already; choose another name"):
        register_loss("npo")(lambda predictions, original: predictions.nll_L)
    assert build_loss("npo").kind.unit == "row"
