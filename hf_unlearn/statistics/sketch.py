"""Low-rank sketches of second moments that are too wide to be kept exactly: linear, so that they add and subtract.

A sketch of `gram_II` is one tensor `[I, R + 1]`: `gram_II @ map_IR` and, as the last column, the diagonal. Both are
linear in the Gram, so the sketches of two data sets add up to that of both, and that of the forget rows subtracts.
(Frequent directions, Ghashami et al. 2016, merge but do not subtract.) The map depends only on I and R; it is
computed again where it is used, with the same bits on every machine.

Tropp, Yurtsever, Udell, Cevher: Fixed-rank approximation of a positive-semidefinite matrix from streaming data, NeurIPS
2017. Their bounds are for Gaussian maps; this one is sparse, which costs next to nothing to apply and misses no more
(tests/statistics/test_sketch.py). Nothing depends on a bound: the diagonal says how much the sketch misses.

Shapes: N rows, I features, R rank of the sketch, Z entries of the map for each feature.
"""

from dataclasses import dataclass
from functools import cache
from hashlib import shake_256

import torch
from torch import Tensor

from hf_unlearn.errors import SettingsError

SKETCH_ABOVE = 12288
"""Default width above which a Gram is sketched: one of 12288 features takes 1.2 GB."""
SKETCH_RANK = 2048
"""Default rank of the sketches."""
SIGNS = 8
"""Z, as Tropp et al. recommend in their later papers."""


@dataclass(frozen=True)
class Sketching:
    """Which Grams and Fishers are sketched, and at which rank.

    >>> Sketching(above=100, rank=20).shape((1000, 1000))
    (1000, 21)

    Attributes:
        above: Those of more features than this; None: none.
        rank: R. A sketch takes `8 I (R + 1)` bytes instead of `8 I^2`, and `2 N I R` operations.

    Raises:
        SettingsError: A rank below 1, or a width below 0.
    """

    above: int | None = None
    rank: int = SKETCH_RANK

    def __post_init__(self) -> None:
        if self.rank < 1 or (self.above is not None and self.above < 0):
            raise SettingsError(
                f"sketch_rank must be at least 1 and sketch_above at least 0, got {self.rank} and {self.above}; use "
                "sketch_above=None for exact sums"
            )

    def columns(self, size: int) -> int:
        """Return the columns of the sums of this many features: all, or R + 1 of a sketch if that is fewer."""
        return size if self.above is None or size <= self.above else min(size, self.rank + 1)

    def shape(self, exact: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of the sums whose exact shape is `[I, I]`, `[G, I, I]` or, of a diagonal, `[I]`."""
        return exact if len(exact) == 1 else (*exact[:-1], self.columns(exact[-1]))


def is_sketch(shape: tuple[int, ...]) -> bool:
    """Return whether sums of this shape are a sketch: they have fewer columns than rows."""
    return len(shape) > 1 and shape[-1] < shape[-2]


def exact_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the exact Gram whose sums, or the sketch of whose sums, have this shape."""
    return (*shape[:-1], shape[-2]) if len(shape) > 1 else shape


EXACT = Sketching()
"""No sketches."""


@cache
def sketch_map(size: int, rank: int, device: torch.device | str = "cpu") -> Tensor:
    """Return `map_RI`, sparse, float64: Z random signs per feature, with `I Z / R` or one more in each row.

    Z times the features are shuffled and assigned to the R rows in turn. The random bits come from SHAKE-256 (FIPS
    202), not from a library's generator, because sketches made by other versions and on other machines must match.
    """
    digest = shake_256(f"hf_unlearn sketch 1 of {size}".encode()).digest(8 * SIGNS * size)
    keys_ZI = torch.frombuffer(bytearray(digest), dtype=torch.int64).view(SIGNS, size)
    row_ZI = (torch.arange(size) % rank).expand(SIGNS, -1)
    indices = torch.stack([row_ZI.flatten(), keys_ZI.argsort(dim=1).flatten()])
    signs = 2.0 * (keys_ZI & 1).double() - 1
    return torch.sparse_coo_tensor(indices, signs.flatten(), (rank, size), check_invariants=True).coalesce().to(device)


def image(rows_NI: Tensor, rank: int) -> Tensor:
    """Return `image_NR = rows_NI @ map_IR` in float64."""
    map_RI = sketch_map(rows_NI.shape[1], rank, rows_NI.device)
    return torch.sparse.mm(map_RI, rows_NI.double().t().contiguous()).t()


def add_sketch(sums_IS: Tensor, rows_NI: Tensor, own: slice = slice(None)) -> None:
    """Add the sketch of `rows^T rows` in place; with `own` only its rows for these features."""
    own_NI = rows_NI[:, own]
    sums_IS[:, :-1].addmm_(own_NI.t(), image(rows_NI, sums_IS.shape[1] - 1))
    sums_IS[:, -1] += torch.linalg.vector_norm(own_NI, dim=0).square()


def sketch_of(gram_II: Tensor, rank: int) -> Tensor:
    """Return the sketch `[I, R + 1]` of an exact Gram; R + 1 must be below I."""
    assert rank + 1 < len(gram_II), "the sketch would be as large as the Gram"
    gram_II = gram_II.double()
    return torch.cat([image(gram_II, rank), gram_II.diagonal().unsqueeze(1)], 1)


def reconstruct(sketch_IS: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decompose the Nystrom approximation `Y (map^T Y)^+ Y^T` with `Y = gram @ map` (Tropp et al., eq. 2).

    For a positive semidefinite Gram the approximation is between zero and the Gram, and equal to it if its rank is at
    most R. What it misses is therefore positive semidefinite too. Its trace is known from the diagonal and bounds the
    error in every norm.

    The missed energy may be inside or outside the vectors' span; the sketch cannot tell. Its trace is spread evenly
    over all I directions, so that the traces agree and no direction inside appears weaker than those outside.

    A pseudo-inverse replaces the paper's shift and Cholesky factor: a Gram that a subtraction made indefinite has no
    such factor, and must be seen to be indefinite.

    Returns:
        values `[R]`, descending, with the missed energy included; vectors `[I, R]`, orthonormal except for zero columns
        if the approximation has a lower rank; the missed energy `[]` in each direction; the negative share `[]` of the
        eigenvalues of `map^T gram map`, which is 0 for a Gram without negative eigenvalues and may be too small
        otherwise, since the map sees only part of them.
    """
    sketch_IS = sketch_IS.double()
    sketch_IR, trace = sketch_IS[:, :-1], sketch_IS[:, -1].sum()
    size, rank = sketch_IR.shape
    core_RR = image(sketch_IR.t(), rank)
    core_R, rotation_RR = torch.linalg.eigh((core_RR + core_RR.t()) / 2)
    kept_R = core_R > size * torch.finfo(torch.float64).eps * core_R.abs().max()
    root_IK = sketch_IR @ (rotation_RR[:, kept_R] / core_R[kept_R].sqrt())
    vectors_IK, roots_K, _ = torch.linalg.svd(root_IK, full_matrices=False)
    padding = (0, rank - roots_K.numel())
    values_R = torch.nn.functional.pad(roots_K.square(), padding)
    missed = ((trace - values_R.sum()) / size).clamp(min=0)
    total = core_R.abs().sum()
    negative = core_R.clamp(max=0).abs().sum() / total.clamp(min=torch.finfo(torch.float64).tiny)
    return values_R + missed, torch.nn.functional.pad(vectors_IK, padding), missed, negative
