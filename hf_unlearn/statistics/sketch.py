"""Low-rank sketches of second moments that are too wide to be kept whole: linear, so that they add and subtract.

A sketch of `gram_II` is one tensor `[I, R + 1]`: `gram_II @ map_IR` and, as the last column, the diagonal. Both are
linear in the Gram, so the sketches of two data sets add up to that of both, and that of the forget rows subtracts.
(Frequent directions, Ghashami et al. 2016, merge but do not subtract.) The map depends on I and R alone and is made
anew where it is used, the same to the bit on every machine.

Tropp, Yurtsever, Udell, Cevher: Fixed-rank approximation of a positive-semidefinite matrix from streaming data, NeurIPS
2017. Their bounds are for Gaussian maps; this one is sparse, which costs next to nothing to apply and misses no more
(tests/test_sketch.py). Nothing rests on a bound: the diagonal says what the sketch has missed.

Shapes: N rows, I features, R rank of the sketch, Z entries of the map for each feature.
"""

from dataclasses import dataclass
from functools import cache
from hashlib import shake_256

import torch
from torch import Tensor

from hf_unlearn.errors import SettingsError

SKETCH_ABOVE, SKETCH_RANK = 12288, 2048  # a Gram of 12288 features takes 1.2 GB

SIGNS = 8  # Z, as Tropp et al. recommend in their later papers


@dataclass(frozen=True)
class Sketching:
    """Which Grams and Fishers are sketched, and how finely.

    Attributes:
        above: Those of more features than this; None for none.
        rank: R. A sketch takes `8 I (R + 1)` bytes instead of `8 I^2`, and `2 N I R` operations.

    Raises:
        SettingsError: A rank below 1, or a width below 0.
    """

    above: int | None = None
    rank: int = SKETCH_RANK

    def __post_init__(self) -> None:
        if self.rank < 1 or (self.above is not None and self.above < 0):
            raise SettingsError(
                f"sketch_rank must be at least 1 and sketch_above 0, got {self.rank} and {self.above}; sums that fit "
                "in memory need no sketch"
            )

    def columns(self, size: int) -> int:
        """Columns of the sums of this many features: all of them, or R + 1 of a sketch if those are fewer."""
        return size if self.above is None or size <= self.above else min(size, self.rank + 1)

    def shape(self, exact: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the sums whose exact shape is `[I, I]`, `[G, I, I]` or, of a diagonal, `[I]`."""
        return exact if len(exact) == 1 else (*exact[:-1], self.columns(exact[-1]))


def is_sketch(shape: tuple[int, ...]) -> bool:
    """Whether sums of this shape are a sketch: fewer columns than rows."""
    return len(shape) > 1 and shape[-1] < shape[-2]


def exact_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the Gram that sums of this shape are those of, or a sketch of."""
    return (*shape[:-1], shape[-2]) if len(shape) > 1 else shape


EXACT = Sketching()
"""No sketches."""


@cache
def sketch_map(size: int, rank: int, device: torch.device | str = "cpu") -> Tensor:
    """`map_RI`, sparse, float64: Z random signs for each feature, in rows that have I Z / R of them or one more each.

    Z times the features are put in random order and dealt out to the R rows in turn. Random bits are from SHAKE-256
    (FIPS 202), not from a library's generator: sketches that were made by other versions and on other machines have to
    fit each other.
    """
    digest = shake_256(f"hf_unlearn sketch 1 of {size}".encode()).digest(8 * SIGNS * size)
    keys_ZI = torch.frombuffer(bytearray(digest), dtype=torch.int64).view(SIGNS, size)
    place_ZI = (torch.arange(size) % rank).expand(SIGNS, -1)
    indices = torch.stack([place_ZI.flatten(), keys_ZI.argsort(dim=1).flatten()])
    signs = 2.0 * (keys_ZI & 1).double() - 1
    return torch.sparse_coo_tensor(indices, signs.flatten(), (rank, size), check_invariants=True).coalesce().to(device)


def image(rows_NI: Tensor, rank: int) -> Tensor:
    """`image_NR = rows_NI @ map_IR` in float64."""
    map_RI = sketch_map(rows_NI.shape[1], rank, rows_NI.device)
    return torch.sparse.mm(map_RI, rows_NI.double().t().contiguous()).t()


def add_sketch(sums_IS: Tensor, rows_NI: Tensor, own: slice = slice(None)) -> None:
    """Add the sketch of `rows^T rows`, in place, or those rows of it that are of the features `own`."""
    own_NI = rows_NI[:, own]
    sums_IS[:, :-1].addmm_(own_NI.t(), image(rows_NI, sums_IS.shape[1] - 1))
    sums_IS[:, -1] += torch.linalg.vector_norm(own_NI, dim=0).square()


def sketch_of(gram_II: Tensor, rank: int) -> Tensor:
    """The sketch `[I, R + 1]` of a Gram that is at hand; R + 1 is below I."""
    assert rank + 1 < len(gram_II), "as large as the Gram itself"
    gram_II = gram_II.double()
    return torch.cat([image(gram_II, rank), gram_II.diagonal().unsqueeze(1)], 1)


def reconstruct(sketch_IS: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eigen-decomposition of the Nystrom approximation `Y (map^T Y)^+ Y^T` with `Y = gram @ map` (Tropp et al., eq. 2).

    Of a positive semidefinite Gram it lies between zero and the Gram, and is the Gram itself where that has rank R at
    most. What it misses therefore is positive semidefinite too, and its trace, which is known from the diagonal, bounds
    the error in every norm.

    What is missed lies in and outside of the vectors' span, nobody knows where: its trace is spread evenly over all I
    directions, so that the traces agree and no direction inside is taken for weaker than those outside.

    A pseudo-inverse in place of the paper's shift and Cholesky factor: a Gram that subtraction has made indefinite has
    no such factor, and must be seen to be indefinite.

    Returns:
        values `[R]`, descending, what is missed included; vectors `[I, R]`, orthonormal but for zero columns where the
        approximation has fewer; what is missed `[]` in each direction; the negative share `[]` of the eigenvalues of
        `map^T gram map`, 0 for a Gram without negative ones (of one that has some it may be too small, for it is all
        that the map sees of them).
    """
    sketch_IS = sketch_IS.double()
    sketch_IR, trace = sketch_IS[:, :-1], sketch_IS[:, -1].sum()
    size, rank = sketch_IR.shape
    core_RR = image(sketch_IR.t(), rank)
    core_R, turn_RR = torch.linalg.eigh((core_RR + core_RR.t()) / 2)
    kept_R = core_R > size * torch.finfo(torch.float64).eps * core_R.abs().max()
    root_IK = sketch_IR @ (turn_RR[:, kept_R] / core_R[kept_R].sqrt())
    vectors_IK, roots_K, _ = torch.linalg.svd(root_IK, full_matrices=False)
    padding = (0, rank - roots_K.numel())
    values_R = torch.nn.functional.pad(roots_K.square(), padding)
    missed = ((trace - values_R.sum()) / size).clamp(min=0)
    total = core_R.abs().sum()
    negative = core_R.clamp(max=0).abs().sum() / total.clamp(min=torch.finfo(torch.float64).tiny)
    return values_R + missed, torch.nn.functional.pad(vectors_IK, padding), missed, negative
