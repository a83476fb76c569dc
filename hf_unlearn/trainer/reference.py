"""What a run takes from its reference model, the checkpoint before the model was fine-tuned on the forget rows.

Without such a checkpoint the original model is its own reference: it predicts each label from a short context
(`models.short_context`).
"""

import math
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from hf_unlearn.core.text import ShortRepr
from hf_unlearn.data.formats import Rows, rows_of
from hf_unlearn.data.row_identity import labelled_row_hash
from hf_unlearn.errors import DataError, SettingsError
from hf_unlearn.evaluation.content import (
    THRESHOLD,
    content_masks,
    content_record,
    has_content_rows,
    substitute_losses,
    with_content,
)
from hf_unlearn.losses.original_outputs import original_outputs
from hf_unlearn.losses.registry import OriginalModel
from hf_unlearn.models.fingerprint import weights_fingerprint
from hf_unlearn.models.loading import load_model
from hf_unlearn.models.tasks import CONTENT_MASK, task_of, vocabulary_size
from hf_unlearn.trainer.config import UnlearningConfig
from hf_unlearn.trainer.inputs import TrainerInputs, precision_of

FOLDER = "reference_outputs"
"""Folder of the stored predictions, in that of the original outputs or in the output folder."""


@dataclass(frozen=True, repr=False)
class Reference(ShortRepr):
    """What a run has taken from its reference model, which is not kept.

    Attributes:
        predictions: Gives the loss the reference model's predictions of the forget rows, from disk.
        forget: The forget rows, with a mask of their content tokens if their labels are tokens of answers.
        content_loss: The reference model's mean loss on these tokens, in nats; None without a mask.
        function_loss: The same on the other tokens; NaN if there are none.
        source: Where these come from, in words.
    """

    predictions: OriginalModel
    forget: Rows
    content_loss: float | None
    function_loss: float
    source: str

    def marked(self, rows: Rows) -> Rows:
        """Return rows that are among the forget rows, with their masks."""
        masks = {labelled_row_hash(row): row.get(CONTENT_MASK) for row in rows_of(self.forget)}
        if self.content_loss is None:
            return rows
        return with_content(rows, [masks[labelled_row_hash(row)] or [] for row in rows_of(rows)], self)


def take_reference(
    inputs: TrainerInputs,
    args: UnlearningConfig,
    model: str | os.PathLike | nn.Module | None = None,
    scope: Callable[[], AbstractContextManager] = nullcontext,
) -> Reference | None:
    """Let the reference model predict the forget rows, once, and return what the run needs of it.

    Args:
        inputs: Prepared inputs; their model has its original weights.
        args: Names the reference model and the folder of stored outputs, if there are any.
        model: The reference model, which takes precedence over `args`.
        scope: Context of the forward passes (autocast).

    Returns:
        None for a loss that reads no reference model.

    Raises:
        SettingsError: A reference model with another vocabulary or other classes, or the model itself; or none for
            rows whose labels are not the tokens of answers.
        ModelError: It cannot be loaded.
        DataError: The model finds no label of the forget rows more likely than its reference.
    """
    if not inputs.loss.reference_contents:
        return None
    named, size = args.reference_model if model is None else model, args.per_device_eval_batch_size
    own, reference = inputs.model.to(args.device), None
    if named is not None:
        reference = named if isinstance(named, nn.Module) else load_model(os.fspath(named), task_of(own))
        _check_reference(reference, own)
        reference = reference.to(args.device).eval()
    elif not has_content_rows(own, inputs.forget):
        raise SettingsError(
            f"loss {inputs.loss.name!r} needs the checkpoint before fine-tuning; pass reference_model, or choose a "
            "loss without a reference"
        )
    stored = original_outputs(
        own if reference is None else reference,
        inputs.loss,
        {"forget": inputs.forget},
        Path(args.original_logprobs or args.output_dir or ".") / FOLDER,
        collator=inputs.collator,
        batch_size=size,
        precision=precision_of(args),
        scope=scope,
        source="short context" if reference is None else "reference",
    )
    forget, content_loss, function_loss = inputs.forget, None, math.nan
    if args.stopping_metric == "content_loss":
        forget = _marked(inputs, reference, size)
        content_loss, function_loss = substitute_losses(own, forget, inputs.collator, reference, size)
    rule = "what the model predicts from a short context" if reference is None else "the reference model's"
    return Reference(lambda: nullcontext(stored), forget, content_loss, function_loss, rule)


def _marked(inputs: TrainerInputs, reference: nn.Module | None, batch_size: int) -> Rows:
    if not has_content_rows(inputs.model, inputs.forget):
        raise SettingsError(
            "forget_metric content_loss is for rows whose labels are the tokens of an answer; set forget_metric to "
            "probability or accuracy"
        )
    masks = content_masks(inputs.model, inputs.forget, inputs.collator, reference, batch_size=batch_size)
    marked = with_content(inputs.forget, masks, reference)
    if not content_record(marked)["content_tokens"]:
        other = "a short context makes it" if reference is None else "the reference model"
        raise DataError(
            f"nothing to forget: the model finds no label of the {len(inputs.forget)} forget rows {THRESHOLD:g} nats "
            f"more likely than {other}; check that the model was trained on these rows, in this format"
        )
    return marked


def _check_reference(reference: nn.Module, model: nn.Module) -> None:
    """Raise `SettingsError` if predictions of the two models cannot be compared, or are the same."""
    for what, size in (("token embeddings", vocabulary_size), ("classes", _classes)):
        theirs, ours = size(reference), size(model)
        if theirs != ours:
            raise SettingsError(
                f"the reference model has {theirs} {what} and the model {ours}; pass the checkpoint that was fine-tuned"
            )
    if weights_fingerprint(reference) == weights_fingerprint(model):
        raise SettingsError("the reference model has the model's own weights; pass the checkpoint before fine-tuning")


def _classes(model: nn.Module) -> int | None:
    return None if task_of(model) == "language-model" else getattr(model.config, "num_labels", None)
