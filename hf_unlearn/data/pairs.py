"""Pairs of forget and retain rows, which are one row of a training set."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset

from hf_unlearn.data.batches import with_content_mask
from hf_unlearn.data.checks import require_rows
from hf_unlearn.data.formats import Row, Rows, rows_of
from hf_unlearn.models.tasks import Batch, Collator


class PairedDataset(Dataset):
    """Forget rows, each with a retain row if there are any, and with its alternate answer if `alternates` is true:
    `{"forget": row, "alternate": row, "retain": row}`.

    Retain rows come in a seeded random order that continues from epoch to epoch, so that every row is used and a
    resumed run sees the same pairs. The length is the number of forget rows.

    >>> pairs = PairedDataset([{"input_ids": [1]}], retain=[{"input_ids": [2]}, {"input_ids": [3]}], seed=0)
    >>> first = pairs[0]["retain"]
    >>> pairs.set_epoch(1)
    >>> len(pairs), sorted([first["input_ids"], pairs[0]["retain"]["input_ids"]])
    (1, [[2], [3]])

    Args:
        forget: Encoded forget rows.
        retain: Encoded retain rows, if any.
        seed: Seed of the order of the retain rows.
        alternates: Add the alternate answer of each forget row.

    Raises:
        DataError: One of the sets is empty.
    """

    def __init__(self, forget: Rows, retain: Rows | None = None, seed: int = 0, alternates: bool = False):
        require_rows(forget, "forget")
        self.forget, self.retain, self.alternates, self.epoch = forget, retain, alternates, 0
        if retain is not None:
            require_rows(retain, "retain")
            self._order = torch.randperm(len(retain), generator=torch.Generator().manual_seed(seed)).tolist()

    def __len__(self) -> int:
        return len(self.forget)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the retain rows; accelerate calls this."""
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
    """Collate rows of `PairedDataset` to `{"forget": batch, "retain": batch}`, and plain rows (evaluation) to a batch.

    >>> from hf_unlearn.data.batches import PaddingCollator
    >>> batch = PairedCollator(PaddingCollator())([{"forget": {"input_ids": [1]}, "retain": {"input_ids": [2]}}])
    >>> batch["retain"]["input_ids"]
    tensor([[2]])

    Attributes:
        collator: Makes a batch of plain rows.
        attacker: Put the attacker's share of the forget rows (`attackers_rows`) in a batch `relearn` and in no other.
    """

    collator: Collator
    attacker: bool = False

    def __call__(self, rows: Sequence[Row]) -> dict[str, Batch] | Batch:
        """Return one batch per part of the pairs, or one batch of plain rows."""
        collate = with_content_mask(self.collator)
        if "forget" not in rows[0]:
            return dict(collate(rows))
        if not self.attacker:
            return {part: collate([row[part] for row in rows]) for part in rows[0]}
        few, others = attackers_rows(rows)
        relearn = {"relearn": collate([row["forget"] for row in few])}
        return {**relearn, **{part: collate([row[part] for row in others]) for part in rows[0]}}


def attackers_rows(rows: Rows) -> tuple[list[Row], list[Row]]:
    """Split rows into every third row, which the attacker has, and the others; a single row is in both parts.

    >>> attackers_rows([{"id": 0}, {"id": 1}, {"id": 2}])
    ([{'id': 0}], [{'id': 1}, {'id': 2}])
    """
    all_rows = list(rows_of(rows))
    if len(all_rows) < 2:
        return all_rows, all_rows
    return all_rows[::3], [row for index, row in enumerate(all_rows) if index % 3]
