"""Forget rows paired with retain rows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_unlearn.data.checks import require_rows
from hf_unlearn.data.formats import Row


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
