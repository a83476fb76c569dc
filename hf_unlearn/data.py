"""From rows as users have them to batches as models take them, and the pairing of forget with retain rows.

Raw rows are those of `formats`; already tokenised rows (`input_ids`, ...) and image rows (`pixel_values`, `labels`)
pass through unchanged. Other answers (`alternatives`) are encoded beside a row's own, for the metrics that compare with
them.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from hf_unlearn.alternatives import WRONG, with_alternatives
from hf_unlearn.errors import DataError
from hf_unlearn.formats import ENCODERS, LABELS, Encode, Encoding, Row
from hf_unlearn.predictions import IGNORED, Task, task_of
from hf_unlearn.sharding import own_indices, world

MODEL_INPUTS = ("input_ids", "pixel_values", "inputs_embeds", "input_features", "input_values")


def require_rows(dataset: Any, what: str) -> None:
    """Raise `DataError` where a data set has no rows."""
    if dataset is None or len(dataset) == 0:
        raise DataError(f"the {what} set is empty; give it at least one row")


def encode_dataset(
    dataset: Any,
    processing_class: Any,
    *,
    what: str = "given",
    max_length: int | None = None,
    model: nn.Module | None = None,
    task: Task | None = None,
    idk_seed: int | None = None,
    streams: bool = False,
) -> Any:
    """Make model inputs of rows of any of the formats of `formats`; rows that are model inputs already pass through.

    The `alternate` answer of a language model's row becomes a row of its own, under `alternate`. Images are encoded
    each time they are read.

    Args:
        dataset: `datasets.Dataset`, any sequence of rows, or a `datasets.IterableDataset`.
        processing_class: The model's tokenizer or image processor; not needed for rows that are model inputs.
        what: The name of the set in error messages.
        max_length: Longest row in tokens; longer rows are cut at the end.
        model: Says what raw rows are to become (`predictions.task_of`), how many classes there are, and its context.
        task: What raw rows are to become, in place of what `model` says; default `language-model`.
        idk_seed: Give each row of a language model an alternate answer that says "I don't know", drawn by this seed
            and the row's content.
        streams: Take a stream too, and return a `RowStream`.

    Returns:
        Rows with `input_ids`, `attention_mask` and `labels` (-100 on the prompt; or the class), as a list, with
        `alternatives` where there are wrong answers; rows with `pixel_values` and `labels`; a `RowStream`; or `dataset`
        itself.

    Raises:
        DataError: No rows, a stream where rows are needed, none of the task's formats, no tokenizer, a row with
            nothing left to predict or longer than the context, or a label that is no class of the model.
    """
    streamed = not hasattr(dataset, "__len__") and dataset is not None
    if not streamed:
        require_rows(dataset, what)
    elif not streams:
        raise DataError(f"the {what} set is a stream, which only collect_statistics reads; make it a list or a Dataset")
    first = next(iter(dataset), None) if streamed else dataset[0]
    if first is None:
        raise DataError(f"the {what} set is empty; give it at least one row")
    if set(first) & set(MODEL_INPUTS):
        return RowStream(dataset, lambda row, index: dict(row)) if streamed else dataset
    task = task or (task_of(model) if model is not None else None) or "language-model"
    encode = ENCODERS[task](set(first), Encoding(processing_class, what, max_length, model))
    if WRONG in first and task == "language-model":
        encode = with_alternatives(encode, what)
    if idk_seed is not None:
        encode = _with_idk(encode, idk_seed)
    if streamed:
        return RowStream(dataset, encode)
    if task == "image-classification":  # all of them at once would take too much memory
        return EncodedRows(dataset, encode)
    return [encode(dataset[index], index) for index in range(len(dataset))]


@dataclass(frozen=True)
class EncodedRows(Dataset):
    """Rows that are encoded when they are read."""

    dataset: Any
    encode: Encode

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.encode(self.dataset[index], index)


def idk_answers() -> list[str]:
    """The answers that say "I don't know", shipped with the package."""
    return (files("hf_unlearn") / "idk.txt").read_text(encoding="utf-8").splitlines()


def _with_idk(encode: Encode, seed: int) -> Encode:
    answers = idk_answers()

    def with_answer(row: Row, index: int) -> dict[str, Any]:
        drawn = hashlib.sha256(f"{seed}:".encode() + row_key(row)).digest()
        return encode({**row, "alternate": answers[int.from_bytes(drawn, "big") % len(answers)]}, index)

    return with_answer


def require_alternates(rows: Any, loss: str) -> None:
    """Raise `DataError` where an encoded forget row has no alternate answer."""
    for index in range(len(rows)):
        if not isinstance(rows[index].get("alternate"), Mapping):
            raise DataError(
                f"loss {loss!r} needs an alternate answer for each forget row, row {index} has none: fill its column "
                "'alternate' (a text; of tokenised rows input_ids and labels), or choose loss idk for raw rows"
            )


def require_labels(rows: Any, what: str) -> bool:
    """Raise `DataError` where a row has no label, or only -100; returns whether labels are those of tokens."""
    for index in range(len(rows)):
        row = rows[index]
        labels = next((row[name] for name in LABELS if name in row), None)
        if labels is None or bool((torch.as_tensor(labels) == IGNORED).all()):
            raise DataError(f"row {index} of the {what} set has no label to predict (none, or all -100); leave it out")
    return torch.as_tensor(labels).ndim > 0


class RowStream(IterableDataset):
    """Rows of a stream, encoded one by one; every process reads all of it and keeps each `n`-th row.

    Attributes:
        total: Rows of the whole stream, once it has been read.
    """

    def __init__(self, dataset: Any, encode: Encode, max_rows: int | None = None):
        self.dataset, self.encode, self.max_rows = dataset, encode, max_rows
        self.total = 0

    def first(self) -> dict[str, Any]:
        return self.encode(next(iter(self.dataset)), 0)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        rank, size = world()
        self.total = 0
        for index, row in enumerate(islice(iter(self.dataset), self.max_rows)):
            self.total = index + 1
            if index % size == rank:
                yield self.encode(row, index)


def take(rows: Any, max_rows: int | None) -> Any:
    """The first rows of encoded ones, of a stream too; all of them with None."""
    if isinstance(rows, RowStream):
        return RowStream(rows.dataset, rows.encode, max_rows)
    return rows if max_rows is None or max_rows >= len(rows) else Subset(rows, range(max_rows))


def own_batches(rows: Any, collator: Callable[[Sequence[Row]], Any], batch_size: int) -> Iterator[tuple[Any, bool]]:
    """Batches of this process's share of encoded rows, each with whether it counts.

    Every process gets the same number of batches, for a sharded model needs them all at every forward pass; those that
    only fill up do not count.
    """
    generator = torch.Generator()  # its own: a loader draws a seed even where it shuffles nothing
    own = () if isinstance(rows, RowStream) else own_indices(len(rows))
    share = rows if isinstance(rows, RowStream) else Subset(rows, own or range(1))
    made, batch = 0, None
    for batch in DataLoader(share, batch_size=batch_size, collate_fn=collator, generator=generator):
        made += 1
        yield batch, bool(own) or isinstance(rows, RowStream)
    total = rows.total if isinstance(rows, RowStream) else len(rows)
    for _ in range(len(range(0, len(own_indices(total, 0)), batch_size)) - made):  # process 0 has the most rows
        yield collator([rows.first()]) if batch is None else batch, False


@dataclass(frozen=True)
class PaddingCollator:
    """Stack rows into a batch, padding token sequences on the right (on the left with `side="left"`).

    Columns of text and other answers are left out, `label` is renamed to `labels`; any other column reaches the model.
    """

    pad_token_id: int = 0
    side: str = "right"

    def __call__(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        batch = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            if isinstance(values[0], (str, Mapping)) or values[0] is None:
                continue
            tensors = [_tensor(value) for value in values]
            batch["labels" if name in ("label", "label_ids") else name] = self._stack(name, tensors)
        if "input_ids" in batch and "attention_mask" not in batch:
            batch["attention_mask"] = self._stack(
                "attention_mask", [torch.ones(len(r["input_ids"])) for r in rows]
            ).long()
        return batch

    def _stack(self, name: str, tensors: list[Tensor]) -> Tensor:
        if tensors[0].ndim != 1 or len({len(t) for t in tensors}) == 1:
            return torch.stack(tensors)
        value = {"input_ids": self.pad_token_id, "labels": IGNORED}.get(name, 0)
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value, padding_side=self.side)


def _tensor(value: Any) -> Tensor:
    """As torch.tensor, but quick for long nested lists: Python's floats become the default dtype."""
    if not isinstance(value, (list, float)):
        return torch.as_tensor(value)
    tensor = torch.as_tensor(np.asarray(value))
    return tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor


def default_collator(processing_class: Any) -> PaddingCollator:
    """The collator for rows of `encode_dataset`, padding with the tokenizer's own token where it has one."""
    pad = getattr(processing_class, "pad_token_id", None)
    return PaddingCollator(pad_token_id=0 if pad is None else pad)


class PairedDataset(Dataset):
    """Forget rows, each with a retain row if there are any, and with its alternate answer if that is asked for:
    `{"forget": row, "alternate": row, "retain": row}`.

    Retain rows come in a seeded random order that goes on from epoch to epoch, so that all of them are used and a
    resumed run sees the same pairs. The length is that of the forget set.
    """

    def __init__(self, forget: Any, retain: Any = None, seed: int = 0, alternates: bool = False):
        require_rows(forget, "forget")
        self.forget, self.retain, self.alternates, self.epoch = forget, retain, alternates, 0
        if retain is not None:
            require_rows(retain, "retain")
            self._order = torch.randperm(len(retain), generator=torch.Generator().manual_seed(seed)).tolist()

    def __len__(self) -> int:
        return len(self.forget)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Row]:
        row = self.forget[index]
        pair: dict[str, Row] = {"forget": {name: value for name, value in row.items() if name != "alternate"}}
        if self.alternates:
            pair["alternate"] = row["alternate"]
        if self.retain is not None:
            pair["retain"] = self.retain[self._order[(self.epoch * len(self) + index) % len(self.retain)]]
        return pair


@dataclass(frozen=True)
class PairedCollator:
    """Collate `PairedDataset` rows to `{"forget": batch, "retain": batch}`, plain rows (evaluation) to a batch.

    With an `attacker`, its part of the forget rows is a batch of its own, `relearn`, and is in no other.
    """

    collator: Callable[[Sequence[Row]], Mapping[str, Tensor]]
    attacker: bool = False

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        if "forget" not in rows[0]:
            return dict(self.collator(rows))
        if not self.attacker:
            return {part: self.collator([row[part] for row in rows]) for part in rows[0]}
        few, others = attackers_rows(rows)
        return {"relearn": self.collator([row["forget"] for row in few])} | PairedCollator(self.collator)(others)


def attackers_rows(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Every third row, which an attacker has, and the others; of a single row the same one twice."""
    rows = list(rows)
    return (rows[::3], [row for index, row in enumerate(rows) if index % 3]) if len(rows) > 1 else (rows, rows)


def row_key(row: Row) -> bytes:
    """Hash of a row's model input (or, for raw rows, of its values), equal for equal rows."""
    digest = hashlib.sha256()
    names = [name for name in MODEL_INPUTS if name in row] or sorted(row)
    for name in names:
        digest.update(_value_key(row[name]))
    return digest.digest()


def labelled_row_key(row: Row) -> bytes:
    """Hash of a row's model input and labels: what a fine-tune learns from it."""
    return row_key(row) + hashlib.sha256(_value_key(row.get("labels"))).digest()


def _value_key(value: Any) -> bytes:
    """Bytes of a value, the same whatever container and precision a row's numbers come in."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.is_floating_point() else value).numpy()  # numpy has no bfloat16
    try:
        array = np.asarray(value)
    except ValueError:  # nested lists of unequal lengths
        return repr(value).encode()
    if array.dtype.kind == "f":
        array = array.astype(np.float32) + np.float32(0)  # a model reads no more of it; -0.0 is 0.0
    elif array.dtype.kind in "biu":
        array = array.astype(np.int64)
    else:
        # text, messages: compared as they are
        return repr(value.tolist() if isinstance(value, np.ndarray) else value).encode()
    return repr(array.shape).encode() + array.tobytes()


def require_disjoint(forget: Any, retain: Any, what: str = "retain") -> None:
    """Raise `DataError` where a row is in the forget set and in the `what` set."""
    keys = {row_key(forget[i]): i for i in range(len(forget))}
    shared = [(keys[key], i) for i in range(len(retain)) if (key := row_key(retain[i])) in keys]
    if shared:
        raise DataError(
            f"{len(shared)} forget rows are also in the {what} set (first: forget row {shared[0][0]} is {what} row "
            f"{shared[0][1]}); remove them from the {what} set"
        )
