"""Sums of products `rows^T rows`, exact, sketched or diagonal, on one process or over several.

Shapes: N rows, F features (I of a layer's inputs, O of its output gradients), G blocks.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod

import torch
from torch import Tensor

from hf_unlearn.core.processes import gather_rows, sum_over_processes
from hf_unlearn.core.sharding import whole
from hf_unlearn.core.storage import Storage, from_own_rows, own_rows
from hf_unlearn.errors import ModelError
from hf_unlearn.statistics.sketch import add_sketch, is_sketch

BANDS = 4
"""Column bands of `add_products`: four bands compute 10 of 16 blocks."""
SMALLEST_BANDED = 256
"""Narrower products are computed in full: more calls would cost more than they save."""


class MomentSums:
    """Sums of `rows^T rows` by name, of one kind: the Grams or the Fishers of a model's layers.

    Sums are created as zeros when a name is first used. Until `complete`, each process has the sums of its own rows,
    and blocks below the diagonal are not computed; with `in_shards` each process has its own rows of the sums instead,
    over the data of all processes.

    Args:
        shapes: Shape of each sum: `[F, F]`, `[G, F, F]`, a diagonal `[F]`, or a sketch's `[..., F, R + 1]`.
        in_shards: Whether processes divide the rows of each sum among them.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], in_shards: bool):
        self.shapes, self.in_shards = shapes, in_shards
        self.tensors: dict[str, Tensor] = {}

    def bytes_of(self, name: str) -> int:
        """Return the bytes of one unfinished sum on this process."""
        rows, *rest = self.shapes[name]
        return 8 * prod(rest) * self._local_rows(rows)

    def tensor(self, name: str, device: torch.device) -> Tensor:
        """Return the sum of this name, which is zero at first."""
        if name not in self.tensors:
            rows, *rest = self.shapes[name]
            self.tensors[name] = torch.zeros(self._local_rows(rows), *rest, dtype=torch.float64, device=device)
        return self.tensors[name]

    def _local_rows(self, rows: int) -> int:
        return len(range(rows)[own_rows(rows)]) if self.in_shards else rows

    def add(self, name: str, rows: Tensor | Sequence[Tensor], counted: bool = True) -> None:
        """Add `rows^T rows` in float64.

        Args:
            rows: `[N, F]`; of blocks `[G, N, F]` or a sequence of `[N, F]`; of a diagonal sum indices `[N, 1]`, whose
                counts are added.
            counted: Whether the rows belong to the data. If not, nothing is added; every process must call this all
                the same if sums are in shards.
        """
        shape = self.shapes[name]
        total = self.tensor(name, rows.device if isinstance(rows, Tensor) else rows[0].device)
        if self.in_shards:
            assert isinstance(rows, Tensor)
            self._add_to_shard(total, rows if counted else rows[:0], shape)
        elif not counted:
            return
        elif len(shape) == 1:
            assert isinstance(rows, Tensor)
            total += torch.bincount(rows.flatten(), minlength=len(total))
        else:
            stacked = len(shape) == 3
            for block_FF, block_NF in zip(total if stacked else [total], rows if stacked else [rows], strict=True):
                if is_sketch(shape):
                    add_sketch(block_FF, block_NF.double())
                else:
                    add_products(block_FF, block_NF.double())

    @staticmethod
    def _add_to_shard(local_FF: Tensor, rows_NF: Tensor, shape: tuple[int, ...]) -> None:
        """Add to this process's rows of the sum, from the data of all processes."""
        local, all_NF = own_rows(shape[0]), gather_rows(rows_NF).double()
        if is_sketch(shape):
            add_sketch(local_FF, all_NF, local)
        else:
            local_FF.addmm_(all_NF[:, local].t(), all_NF)

    def so_far(self) -> Iterator[tuple[str, Tensor]]:
        """Yield each sum that is a matrix, over the rows of all processes up to now, one after the other."""
        for name, local in self.tensors.items():
            if local.ndim == 1:
                continue
            if self.in_shards:
                yield name, whole(from_own_rows(local, self.shapes[name][0]))
                continue
            total = local.clone()
            for total_FF in _exact_matrices(total):
                mirror(total_FF)
            sum_over_processes({name: total})
            yield name, total

    def complete(self, names: Sequence[str], storage: Storage) -> None:
        """Sum over the processes, fill in the lower blocks, and move the sums of `names` to `storage`.

        Raises:
            ModelError: A sum is not finite.
        """
        for name in (name for name in names if name in self.tensors):
            total = self.tensors[name]
            if not self.in_shards:
                for total_FF in _exact_matrices(total):
                    mirror(total_FF)
                sum_over_processes({name: total})
            if not torch.isfinite(total).all():
                raise ModelError(f"the sum of {name} is not finite (NaN or infinite); check the weights and the rows")
            rows = self.shapes[name][0]
            self.tensors[name] = from_own_rows(total, rows) if self.in_shards else storage.keep(total)


def _exact_matrices(sums: Tensor) -> Sequence[Tensor]:
    """The exact matrices of sums: one, one per block, or none of a diagonal or a sketch."""
    if is_sketch(sums.shape):
        return []
    return list(sums) if sums.ndim == 3 else [sums] * (sums.ndim == 2)


def add_products(sums_FF: Tensor, rows_NF: Tensor) -> None:
    """Add `rows^T rows` in place, in the blocks on and above the diagonal; `mirror` fills in the others.

    The blocks come from `BANDS` bands of columns.
    """
    for band in _bands(len(sums_FF)):
        sums_FF[band, band.start :].addmm_(rows_NF[:, band].t(), rows_NF[:, band.start :])


def mirror(sums_FF: Tensor) -> None:
    """Complete sums of `add_products`: copy the blocks above the diagonal below it, in place."""
    for band in _bands(len(sums_FF)):
        sums_FF[band.stop :, band] = sums_FF[band, band.stop :].t()


def products_share(size: int) -> float:
    """Return the share of the operations of `rows^T rows` that `add_products` computes for F = `size`."""
    return sum((band.stop - band.start) * (size - band.start) for band in _bands(size)) / size**2


def _bands(size: int) -> list[slice]:
    width = -(-size // BANDS) if size >= SMALLEST_BANDED else max(size, 1)
    return [slice(start, min(start + width, size)) for start in range(0, size, width)]
