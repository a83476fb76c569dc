"""Fine-tuned models, with and without the forget rows, which a demonstration or a benchmark compares."""

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments, set_seed
from transformers.utils import logging

from hf_unlearn.core.files import replace_folder
from hf_unlearn.core.processes import is_main, wait_for_all, world
from hf_unlearn.core.settings import require_ranges
from hf_unlearn.core.sharding import sharding_of
from hf_unlearn.data.formats import Row
from hf_unlearn.data.row_identity import labelled_row_hash
from hf_unlearn.errors import SettingsError
from hf_unlearn.models.fingerprint import weights_fingerprint

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class FineTuning:
    """Settings of a plain fine-tune (AdamW, linear decay, loss on the labels).

    Attributes:
        epochs: Passes over the rows.
        learning_rate: Peak learning rate.
        batch_size: Rows of one step, over all processes.
        weight_decay: Of AdamW.
        seed: Of the order of rows and of dropout.

    Raises:
        SettingsError: A value out of range; the message names the flag.
    """

    epochs: float = 8.0
    learning_rate: float = 1e-4
    batch_size: int = 10
    weight_decay: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        minima = {"epochs": 0, "learning_rate": 0, "batch_size": 1, "weight_decay": 0}
        ranges = {name: (minimum, math.inf) for name, minimum in minima.items()}
        require_ranges(self, ranges | {"seed": (0, 2**32)}, "fine_tune_")

    def run(
        self, model: nn.Module, rows: Sequence[Row], collator: Callable, scratch: str | os.PathLike
    ) -> dict[str, Tensor] | None:
        """Fine-tune `model` in place on `rows`.

        Args:
            model: Changed in place.
            rows: Encoded rows.
            collator: Rows to batch.
            scratch: Folder that `Trainer` may use.

        Returns:
            Its weights, on process 0 alone, if they are sharded over processes; else None.

        Raises:
            SettingsError: A batch size that the processes cannot share equally.
        """
        _, processes = world()
        if self.batch_size % processes:
            raise SettingsError(
                f"the fine-tune's batch size {self.batch_size} is not a multiple of {processes} processes; pass "
                "another (--fine_tune_batch_size)"
            )
        set_seed(self.seed)
        args = TrainingArguments(
            str(scratch),
            num_train_epochs=self.epochs,
            learning_rate=self.learning_rate,
            seed=self.seed,
            per_device_train_batch_size=self.batch_size // processes,
            weight_decay=self.weight_decay,
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            remove_unused_columns=False,
            use_cpu=not torch.accelerator.is_available(),  # without it several CPU processes would train separately
        )
        trainer = Trainer(model, args, train_dataset=rows, data_collator=collator)
        trainer.train()
        if sharding_of(trainer.accelerator) == "none":
            return None
        return trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}


def cache_folder(folder: str | os.PathLike | None) -> Path:
    """Return where prepared models and statistics are kept: `folder`, or `hf_unlearn` in the Hub client's home."""
    if folder is not None:
        return Path(folder)
    from huggingface_hub.constants import HF_HOME

    return Path(HF_HOME) / "hf_unlearn"


def fine_tuned(
    load: Callable[[str | os.PathLike | None], nn.Module],
    rows: Sequence[Row],
    settings: FineTuning,
    collator: Callable,
    cache: Path,
) -> tuple[nn.Module, float]:
    """Return the model fine-tuned on `rows`, from `cache` if it was made before.

    Args:
        load: Loads the base model if given None, else the model in the folder given.
        rows: Encoded rows.
        settings: How to fine-tune.
        collator: Rows to batch.
        cache: Folder of prepared models. The name of an entry is a hash of weights, rows and settings.

    Returns:
        The model, and the seconds that making it took.
    """
    base = load(None)
    folder = cache / f"model-{_cache_key(base, rows, settings)}"
    if folder.is_dir():
        del base
        logger.info(f"using {folder}")
        return load(folder), json.loads((folder / "fine_tuning.json").read_text())["seconds"]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        state = settings.run(base, rows, collator, scratch)
    seconds = round(time.perf_counter() - start, 1)
    if is_main():
        with replace_folder(folder) as new:
            base.save_pretrained(new, state_dict=state)  # type: ignore[operator]
            record = {**asdict(settings), "rows": len(rows), "seconds": seconds}
            (new / "fine_tuning.json").write_text(json.dumps(record))
    wait_for_all()
    return (base if state is None else load(folder)).eval(), seconds


def _cache_key(base: nn.Module, rows: Sequence[Row], settings: FineTuning) -> str:
    digest = sha256(weights_fingerprint(base).encode())
    for row in rows:
        digest.update(labelled_row_hash(row))
    digest.update(repr({name: float(value) for name, value in asdict(settings).items()}).encode())
    return digest.hexdigest()[:20]
