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
from tqdm.auto import tqdm
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

from hf_unlearn.core.files import replace_folder
from hf_unlearn.core.processes import is_main, wait_for_all, world
from hf_unlearn.core.settings import require_ranges
from hf_unlearn.core.sharding import sharding_of
from hf_unlearn.data.formats import Row
from hf_unlearn.data.row_identity import labelled_row_hash
from hf_unlearn.errors import SettingsError
from hf_unlearn.models.arguments import taken_inputs
from hf_unlearn.models.fingerprint import weights_fingerprint
from hf_unlearn.models.tasks import Collator

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
        self,
        model: nn.Module,
        rows: Sequence[Row],
        collator: Callable,
        scratch: str | os.PathLike,
        title: str | None = None,
    ) -> dict[str, Tensor] | None:
        """Fine-tune `model` in place on `rows`.

        Args:
            model: Changed in place.
            rows: Encoded rows.
            collator: Rows to batch.
            scratch: Folder that `Trainer` may use.
            title: What the progress bar is called; None shows none.

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
            disable_tqdm=True,  # its bar has no name, and its log lines are raw dicts
            use_cpu=not torch.accelerator.is_available(),  # without it several CPU processes would train separately
        )
        trainer = Trainer(model, args, train_dataset=rows, data_collator=_taken(model, collator))
        trainer.remove_callback(PrinterCallback)
        if title is not None and is_main():
            trainer.add_callback(_NamedBar(f"{title} on {len(rows)} rows"))
        trainer.train()
        if sharding_of(trainer.accelerator) == "none":
            return None
        return trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}


def _taken(model: nn.Module, collator: Collator) -> Collator:
    """Return a collator without the columns that the model does not take."""
    return lambda rows: taken_inputs(model, collator(rows))


class _NamedBar(TrainerCallback):
    """A progress bar of the steps, on standard error."""

    def __init__(self, title: str):
        self._title = title
        self._bar: tqdm | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        disable = not logging.is_progress_bar_enabled()
        self._bar = tqdm(total=state.max_steps, desc=self._title, unit="step", disable=disable)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        if self._bar is not None:
            self._bar.close()


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
    title: str | None = None,
) -> tuple[nn.Module, float]:
    """Return the model fine-tuned on `rows`, from `cache` if it was made before.

    Args:
        load: Loads the base model if given None, else the model in the folder given.
        rows: Encoded rows.
        settings: How to fine-tune.
        collator: Rows to batch.
        cache: Folder of prepared models. The name of an entry is a hash of weights, rows and settings.
        title: What the progress bar is called; None shows none.

    Returns:
        The model, whose configuration names the base model wherever the weights came from, and the seconds that making
        it took.
    """
    base = load(None)
    name = getattr(getattr(base, "config", None), "_name_or_path", "")
    folder = cache / f"model-{_cache_key(base, rows, settings)}"
    if folder.is_dir():
        del base
        logger.info(f"using {folder}")
        record = json.loads((folder / "fine_tuning.json").read_text())
        return _named(load(folder), name, folder), record["seconds"]
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        state = settings.run(base, rows, collator, scratch, title)
    seconds = round(time.perf_counter() - start, 1)
    if is_main():
        with replace_folder(folder) as new:
            base.save_pretrained(new, state_dict=state)  # type: ignore[operator]
            record = {**asdict(settings), "rows": len(rows), "seconds": seconds}
            (new / "fine_tuning.json").write_text(json.dumps(record))
    wait_for_all()
    return _named(base if state is None else load(folder), name, folder).eval(), seconds


def _named(model: nn.Module, base: str, folder: Path) -> nn.Module:
    """Name the base model in the configuration, for reports, and the folder as the place of the weights.

    PEFT writes that place into an adapter: loaded with the base model's own weights it would be another model.
    """
    config = getattr(model, "config", None)
    if config is not None:
        config._name_or_path = base
        model.__dict__["name_or_path"] = str(folder)
    return model


def _cache_key(base: nn.Module, rows: Sequence[Row], settings: FineTuning) -> str:
    digest = sha256(weights_fingerprint(base).encode())
    for row in rows:
        digest.update(labelled_row_hash(row))
    digest.update(repr({name: float(value) for name, value in asdict(settings).items()}).encode())
    return digest.hexdigest()[:20]
