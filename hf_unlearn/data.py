"""From rows as users have them to batches as models take them, and the pairing of forget with retain rows.

Row formats are TRL's: `messages`, `prompt`/`completion`, `text`; `question`/`answer` (TOFU's columns); or already
tokenised rows (`input_ids`, ...) and image rows (`pixel_values`, `labels`), which pass through unchanged. Other answers
(`alternatives`) are encoded beside a row's own, for the metrics that compare with them.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_unlearn.alternatives import WRONG, with_alternatives
from hf_unlearn.errors import DataError
from hf_unlearn.predictions import IGNORED

MODEL_INPUTS = ("input_ids", "pixel_values", "inputs_embeds", "input_features", "input_values")
FORMATS = ("messages", "prompt + completion", "question + answer", "text")
Row = Mapping[str, Any]


def require_rows(dataset: Any, what: str) -> None:
    """Raise `DataError` where a data set has no rows."""
    if dataset is None or len(dataset) == 0:
        raise DataError(f"the {what} set is empty; give it at least one row")


def encode_dataset(dataset: Any, processing_class: Any, *, what: str = "given", max_length: int | None = None) -> Any:
    """Tokenise rows of any of the formats above; rows that are model inputs already pass through.

    Args:
        dataset: `datasets.Dataset` or any sequence of rows.
        processing_class: The model's tokenizer; not needed for rows that are model inputs.
        what: The name of the set in error messages.
        max_length: Longest row in tokens; longer rows are cut at the end.

    Returns:
        Rows with `input_ids`, `attention_mask` and `labels` (-100 on the prompt), as a list, with `alternatives` where
        there are wrong answers; or `dataset` itself.

    Raises:
        DataError: No rows, none of the formats, no tokenizer, or a row with nothing left to predict.
    """
    require_rows(dataset, what)
    columns = set(dataset[0])
    if columns & set(MODEL_INPUTS):
        return dataset
    encode = _encoder(columns, what)
    if processing_class is None or not callable(getattr(processing_class, "encode", None)):
        raise DataError(f"the {what} set has raw columns {sorted(columns)}; pass the model's tokenizer to encode them")

    def encode_row(row: Row, index: int) -> dict[str, Any]:
        prompt, whole = encode(row, processing_class)
        prompt, whole = prompt[:max_length], whole[:max_length]
        if max(len(prompt), 1) >= len(whole):  # nothing comes before a text's first token to predict it from
            raise DataError(
                f"row {index} of the {what} set has no token to predict within {max_length or 'its'} tokens"
            )
        labels = [IGNORED] * len(prompt) + whole[len(prompt) :]
        return {"input_ids": whole, "attention_mask": [1] * len(whole), "labels": labels}

    encoded = with_alternatives(encode_row, what) if WRONG in columns else encode_row
    return [encoded(dataset[index], index) for index in range(len(dataset))]


def _encoder(columns: set[str], what: str) -> Callable[[Row, Any], tuple[list[int], list[int]]]:
    """How rows of these columns become (prompt tokens, all tokens)."""
    if "messages" in columns:
        return lambda row, tokenizer: _encode_chat(row["messages"], tokenizer)
    for prompt, completion in (("prompt", "completion"), ("question", "answer")):
        if {prompt, completion} <= columns:
            return lambda row, tokenizer: _encode_pair(row[prompt], row[completion], tokenizer, prompt == "question")
    if "text" in columns:
        return lambda row, tokenizer: ([], _close(tokenizer.encode(row["text"]), tokenizer))
    raise DataError(
        f"the {what} set has columns {sorted(columns)}; needed is one of: {', '.join(FORMATS)}, or input_ids"
    )


def _encode_pair(prompt: Any, completion: Any, tokenizer: Any, is_question: bool) -> tuple[list[int], list[int]]:
    if not isinstance(prompt, str):  # TRL's conversational form: two lists of messages
        return _encode_chat([*prompt, *completion], tokenizer)
    if is_question and getattr(tokenizer, "chat_template", None):
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
        return _encode_chat(messages, tokenizer)
    if is_question:
        prompt, completion = f"Question: {prompt}\nAnswer:", f" {completion}"
    head = tokenizer.encode(prompt)
    tail = tokenizer.encode(completion, add_special_tokens=False)
    return head, _close(head + tail, tokenizer)


def _encode_chat(messages: Sequence[Row], tokenizer: Any) -> tuple[list[int], list[int]]:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError("the rows are messages, but the tokenizer has no chat template; use prompt + completion rows")
    options = {"tokenize": True, "return_dict": False}
    whole = tokenizer.apply_chat_template(messages, **options)
    if len(messages) < 2:
        return [], whole
    head = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, **options)
    # a template may write the prompt otherwise once an answer follows: what both begin with is prompt for certain
    differ = (i for i, (left, right) in enumerate(zip(head, whole, strict=False)) if left != right)
    return whole[: next(differ, len(head))], whole


def _close(tokens: list[int], tokenizer: Any) -> list[int]:
    end = tokenizer.eos_token_id
    return tokens if end is None or (tokens and tokens[-1] == end) else [*tokens, end]


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
    """Forget rows, each with a retain row: `{"forget": row}` or `{"forget": row, "retain": row}`.

    Retain rows come in a seeded random order that goes on from epoch to epoch, so that all of them are used and a
    resumed run sees the same pairs. The length is that of the forget set.
    """

    def __init__(self, forget: Any, retain: Any = None, seed: int = 0):
        require_rows(forget, "forget")
        self.forget, self.retain, self.epoch = forget, retain, 0
        if retain is not None:
            require_rows(retain, "retain")
            self._order = torch.randperm(len(retain), generator=torch.Generator().manual_seed(seed)).tolist()

    def __len__(self) -> int:
        return len(self.forget)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Row]:
        pair = {"forget": self.forget[index]}
        if self.retain is not None:
            pair["retain"] = self.retain[self._order[(self.epoch * len(self) + index) % len(self.retain)]]
        return pair


@dataclass(frozen=True)
class PairedCollator:
    """Collate `PairedDataset` rows to `{"forget": batch, "retain": batch}`, plain rows (evaluation) to a batch."""

    collator: Callable[[Sequence[Row]], Mapping[str, Tensor]]

    def __call__(self, rows: Sequence[Row]) -> dict[str, Any]:
        if "forget" not in rows[0]:
            return dict(self.collator(rows))
        return {part: self.collator([row[part] for row in rows]) for part in rows[0]}


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


def require_disjoint(forget: Any, retain: Any) -> None:
    """Raise `DataError` where a row is in the forget set and in the retain set."""
    keys = {row_key(forget[i]): i for i in range(len(forget))}
    shared = [(keys[key], i) for i in range(len(retain)) if (key := row_key(retain[i])) in keys]
    if shared:
        raise DataError(
            f"{len(shared)} forget rows are also in the retain set (first: forget row {shared[0][0]} is retain row "
            f"{shared[0][1]}); remove them from the retain set"
        )
