"""Outputs of the original or the reference model on disk, so that training needs no second forward pass.

A folder of safetensors that are read through memory maps. It holds for each row its labels and, depending on the loss,
one negative log-likelihood per label (npo, dpo), log-probabilities of all V classes or vocabulary entries at each label
(next_best, undial, KL: `4 L V` bytes), or hidden states behind each label (rmu: `4 L P D` bytes), all float32. Rows are
found by a hash of their inputs and labels, regardless of batch and padding.

Shapes: B rows, L label positions, V classes or vocabulary entries, P positions behind a label, D features.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Literal, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from hf_unlearn.core.files import replace_folder, write_json
from hf_unlearn.core.processes import gather, is_main, wait_for_all
from hf_unlearn.core.text import one_line
from hf_unlearn.data.formats import Row, Rows
from hf_unlearn.data.row_identity import labelled_batch_hashes, rows_to_text
from hf_unlearn.errors import DataError, SettingsError
from hf_unlearn.losses.base import UnlearningLoss
from hf_unlearn.losses.registry import Content, OriginalModel, Predict
from hf_unlearn.models.fingerprint import weights_fingerprint
from hf_unlearn.models.forward import Hidden, Predictions, counted_labels, label_positions, predict
from hf_unlearn.models.modes import eval_mode
from hf_unlearn.models.short_context import CONTEXT, predict_from_short_context
from hf_unlearn.models.tasks import IGNORED, Batch, Collator

FORMAT = 1
INDEX = "original_outputs.json"
SHARD_BYTES = 1 << 28


def original_outputs(
    model: nn.Module,
    loss: UnlearningLoss,
    rows: Mapping[str, Rows | None],
    folder: str | os.PathLike,
    *,
    collator: Collator,
    batch_size: int = 8,
    precision: str = "fp32",
    scope: Callable[[], AbstractContextManager] = nullcontext,
    source: Literal["original", "reference", "short context"] = "original",
) -> "StoredOutputs":
    """Open the outputs in `folder`; if there are none, run the model on the rows that `loss` reads first.

    In a distributed run every process makes the forward passes (a sharded model needs all of them), process 0 writes,
    and all processes read, so all must see the folder.

    Args:
        model: The original or the reference model.
        loss: Determines what is stored of which part of a batch (`original_contents`, `reference_contents`).
        rows: Encoded rows by part: `forget`, `alternate`, `retain`; None for a part without rows.
        folder: Folder of the outputs.
        collator: Makes batches of rows.
        batch_size: Rows per forward pass.
        precision: Name of the precision of the forward passes; stored outputs of another precision are refused.
        scope: Context of the forward passes (autocast).
        source: What the model is to the loss. With `short context` the original model is its own reference, and
            predicts each label from the last tokens before it (`models.short_context`).

    Raises:
        SettingsError: The folder holds outputs of other weights, rows, precision or contents, or is damaged.
        OutputError: The folder holds something else.
    """
    present = {part: data for part, data in rows.items() if data is not None}
    wanted = loss.original_contents if source == "original" else loss.reference_contents
    contents = {part: content for part, content in wanted.items() if part in present}
    layer = loss.layer if "hidden" in contents.values() else None
    short, target = source == "short context", Path(folder)
    keys = {part: _row_keys(present[part], collator, batch_size) for part in contents}
    index = {
        "format": FORMAT,
        "weights": weights_fingerprint(model),
        "rows": {part: rows_to_text(sum(int(key, 16) for key in of_part)) for part, of_part in keys.items()},
        "contents": contents,
        "layer": layer,
        "precision": precision,
        "context": CONTEXT if short else None,
    }
    if not gather((target / INDEX).is_file())[0]:  # decided before anything is written, so that all processes agree
        predictor = predict_from_short_context if short else predict
        _write(model, layer, present, target, index, contents, collator, batch_size, scope, predictor)
    return StoredOutputs(target, index)


def frozen_copy(model: nn.Module) -> OriginalModel:
    """Return an `OriginalModel` that predicts with `model`, a copy of the original model, which is frozen here."""
    model.requires_grad_(False).eval()
    return lambda: nullcontext(lambda current, *inputs: predict(model, *inputs))


def _loader(rows: Rows, collator: Collator, batch_size: int) -> DataLoader:
    dataset = cast("Dataset[Row]", rows)  # a loader needs a length and rows by number, nothing else
    return DataLoader(dataset, batch_size=batch_size, collate_fn=collator, generator=torch.Generator())


def _row_keys(rows: Rows, collator: Collator, batch_size: int) -> list[str]:
    return [key for batch in _loader(rows, collator, batch_size) for key in labelled_batch_hashes(batch)]


def _write(
    model: nn.Module,
    layer: int | str | None,
    rows: Mapping[str, Rows],
    target: Path,
    index: Mapping[str, object],
    contents: Mapping[str, Content],
    collator: Collator,
    batch_size: int,
    scope: Callable[[], AbstractContextManager],
    predictor: Predict,
) -> None:
    device = next(model.parameters()).device
    folder_scope: AbstractContextManager[Path | None] = replace_folder(target) if is_main() else nullcontext()
    with eval_mode(model), torch.no_grad(), folder_scope as new_folder:
        shards = _Shards(new_folder)
        for part, content in contents.items():
            for batch in _loader(rows[part], collator, batch_size):
                inputs = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
                with scope():
                    predictions = predictor(model, inputs, False, layer if content == "hidden" else None)
                shards.add(labelled_batch_hashes(inputs), predictions, content)
        shards.flush()
        if new_folder is not None:
            write_json(new_folder / INDEX, index)
    wait_for_all()


class _Shards:
    """Collects tensors and writes a file whenever they reach `SHARD_BYTES`; without a folder it does nothing."""

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.tensors: dict[str, Tensor] = {}
        self.bytes = self.files = 0

    def add(self, keys: list[str], predictions: Predictions, content: str) -> None:
        if self.folder is None:
            return
        for row, key in enumerate(keys):
            in_row_L = predictions.rows_L == row
            self._put(f"{key}.labels", predictions.labels_L[in_row_L])
            self._put(f"{key}.{content}", _values(predictions, content, in_row_L))
        if self.bytes >= SHARD_BYTES:
            self.flush()

    def _put(self, name: str, tensor: Tensor) -> None:
        self.tensors[name] = tensor.cpu().contiguous()
        self.bytes += tensor.numel() * tensor.element_size()

    def flush(self) -> None:
        if self.folder is not None and self.tensors:
            save_file(self.tensors, self.folder / f"outputs-{self.files:05d}.safetensors")
            self.tensors, self.bytes, self.files = {}, 0, self.files + 1


def _values(predictions: Predictions, content: str, in_row_L: Tensor) -> Tensor:
    """Return what is stored of one row with l labels: `[l]`, `[l, V]`, or `[l, p, D]` for p unmasked positions."""
    if content == "nll":
        return predictions.nll_L[in_row_L].float()
    if content == "logits":
        return predictions.logits_LV[in_row_L].float().log_softmax(-1)
    assert predictions.hidden is not None
    states_LPD, mask_LP = predictions.hidden.states_LPD[in_row_L], predictions.hidden.mask_LP[in_row_L]
    positions = int(mask_LP[0].sum()) if len(mask_LP) else 0
    return states_LPD[mask_LP].reshape(len(states_LPD), positions, states_LPD.shape[-1]).float()


class StoredOutputs:
    """The original model's predictions, read from a folder of `original_outputs`; called like `predict`."""

    def __init__(self, folder: Path, expected: Mapping[str, object]):
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            files = [safe_open(path, framework="pt") for path in sorted(folder.glob("outputs-*.safetensors"))]
        except (OSError, ValueError, SafetensorError) as error:
            raise SettingsError(
                f"{folder} is damaged ({one_line(error)}); remove it, and it is computed again"
            ) from error
        for name, value in expected.items():
            if index.get(name) != value:
                raise SettingsError(
                    f"{folder} holds original outputs of other {name}; name another folder, or remove it to compute "
                    "them again"
                )
        self.folder = folder
        self._file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118  (not a mapping)

    def __call__(
        self, model: nn.Module, inputs: Batch, skip_first: bool = False, layer: int | str | None = None
    ) -> Predictions:
        """Return the original model's predictions for a batch; `model` itself does not run.

        Raises:
            DataError: A row of the batch is not in the folder.
        """
        labels = counted_labels(model, inputs)
        keys, device = labelled_batch_hashes(inputs), labels.device
        rows_L = label_positions(model, labels).nonzero()[:, 0]
        labels_L = self._read(keys, "labels", device)
        if len(labels_L) != len(rows_L):
            raise DataError(
                f"{self.folder} has {len(labels_L)} labels for a batch with {len(rows_L)}; remove the folder"
            )
        nll_L = logits_LV = hidden = None
        if layer is not None:
            hidden = _align(list(self._tensors(keys, "hidden")), inputs, device)
        elif f"{keys[0]}.logits" in self._file_of:
            logits_LV = self._read(keys, "logits", device)
        else:
            nll_L = self._read(keys, "nll", device)
        if logits_LV is None:
            logits_LV = torch.empty(len(labels_L), 0, device=device)
        predictions = Predictions(logits_LV, labels_L, rows_L, len(labels), hidden, None, inputs, nll_L)
        return _without_first_label(predictions, model) if skip_first else predictions

    def _tensors(self, keys: list[str], content: str) -> Iterator[Tensor]:
        for key in keys:
            name = f"{key}.{content}"
            if name not in self._file_of:
                raise DataError(f"a row of the batch is not in {self.folder}; remove the folder to compute it again")
            yield self._file_of[name].get_tensor(name)

    def _read(self, keys: list[str], content: str, device: torch.device) -> Tensor:
        return torch.cat(list(self._tensors(keys, content))).to(device)


def _align(stored: list[Tensor], inputs: Batch, device: torch.device) -> Hidden:
    """Place the stored states `[l, p, D]` of each row at the positions of the padded batch: `[L, P, D]`."""
    mask, labels = inputs.get("attention_mask"), inputs["labels"]
    stored = [s for s in stored if len(s)]
    positions = None if mask is None or labels.ndim > 1 else mask.sum(1)[labels != IGNORED].tolist()
    if mask is None or positions != [s.shape[1] for s in stored]:
        states_LPD = torch.cat(stored).to(device)
        return Hidden(states_LPD, torch.ones_like(states_LPD[..., 0], dtype=torch.bool))
    mask_LP = mask.bool()[labels != IGNORED]
    states_LPD = torch.zeros(*mask_LP.shape, stored[0].shape[-1], device=device)
    states_LPD[mask_LP] = torch.cat([s.flatten(0, 1) for s in stored]).to(device)
    return Hidden(states_LPD, mask_LP)


def _without_first_label(predictions: Predictions, model: nn.Module) -> Predictions:
    """Drop the labels that `label_positions` skips."""
    assert predictions.inputs is not None
    labels = counted_labels(model, predictions.inputs)
    keep_L = label_positions(model, labels, skip_first=True)[label_positions(model, labels)]
    return replace(
        predictions,
        logits_LV=predictions.logits_LV[keep_L],
        labels_L=predictions.labels_L[keep_L],
        rows_L=predictions.rows_L[keep_L],
        known_nll_L=None if predictions.known_nll_L is None else predictions.known_nll_L[keep_L],
    )
