"""Low-rank sketches of second moments that are too wide to be kept whole: linear, so that they add and subtract.

A sketch of `gram_II` is one tensor `[I, R + 1]`: `gram_II @ map_IR` and, as the last column, the diagonal. Both are
linear in the Gram, so the sketches of two data sets add up to that of both, and that of the forget rows subtracts. The
map depends on the width alone and is made anew where it is used, the same to the bit on every machine.

Tropp, Yurtsever, Udell, Cevher: Fixed-rank approximation of a positive-semidefinite matrix from streaming data, NeurIPS
2017. Their map is Gaussian; here entries are uniform (bytes of a hash), which have the same first moments, and
sub-Gaussian tails. What such a map may cost is not argued but measured: the diagonal says what the sketch has missed.

Shapes: N rows, I features, R rank of the sketch.
"""

from dataclasses import dataclass
from hashlib import shake_256

import torch
from torch import Tensor

from hf_unlearn.errors import SettingsError


@dataclass(frozen=True)
class Sketching:
    """Which Grams and Fishers are sketched, and how finely.

    Attributes:
        above: Those of more features than this; None for none.
        rank: R. A sketch takes `8 I (R + 1)` bytes instead of `8 I^2`, and its products `4 N I R` operations.

    Raises:
        SettingsError: A rank below 1, or a width below 0.
    """

    above: int | None = None
    rank: int = 1024

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


def sketch_map(size: int, rank: int) -> Tensor:
    """`map_IR`: independent, uniform on 256 values around zero; its first columns are those of a smaller rank.

    From SHAKE-256 (FIPS 202) of the size, not from a library's generator: sketches that were made by other versions
    and on other machines have to fit each other.
    """
    digest = shake_256(f"hf_unlearn sketch 1 of {size}".encode()).digest(size * rank)
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8).view(rank, size).t().double() - 127.5


def add_sketch(sums_IS: Tensor, rows_NI: Tensor, image_NR: Tensor, own: slice = slice(None)) -> None:
    """Add the sketch of `rows^T rows`, in place; `image_NR` is `rows_NI @ map_IR`, `own` which features sums are of."""
    own_NI = rows_NI[:, own]
    sums_IS[:, :-1].addmm_(own_NI.t(), image_NR)
    sums_IS[:, -1] += own_NI.square().sum(0)


def sketch_of(gram_II: Tensor, rank: int) -> Tensor:
    """The sketch `[I, R + 1]` of a Gram that is at hand; R + 1 is below I."""
    assert rank + 1 < len(gram_II), "as large as the Gram itself"
    gram_II = gram_II.double()
    image_IR = gram_II @ sketch_map(len(gram_II), rank).to(gram_II.device)
    return torch.cat([image_IR, gram_II.diagonal().unsqueeze(1)], 1)


def reconstruct(sketch_IS: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Eigen-decomposition of the Nystrom approximation `Y (map^T Y)^+ Y^T` with `Y = gram @ map` (Tropp et al., eq. 2).

    Of a positive semidefinite Gram it lies between zero and the Gram, and is the Gram itself where that has rank R at
    most. What it misses therefore is positive semidefinite too, and its trace, which is known from the diagonal, bounds
    the error in every norm.

    A pseudo-inverse in place of the paper's shift and Cholesky factor: a Gram that subtraction has made indefinite has
    no such factor, and must be seen to be indefinite.

    Returns:
        values `[R]`, descending and zero where there are fewer; vectors `[I, R]`, orthonormal but for zero columns that
        belong to zero values; the mean `[]` of the I - R eigenvalues that are missed; the negative share `[]` of the
        eigenvalues of `map^T gram map`, 0 for a Gram without negative ones (of one that has some it may be too small,
        for it is all that the map sees of them).
    """
    sketch_IS = sketch_IS.double()
    sketch_IR, trace = sketch_IS[:, :-1], sketch_IS[:, -1].sum()
    size, rank = sketch_IR.shape
    core_RR = sketch_map(size, rank).to(sketch_IR.device).t() @ sketch_IR
    core_R, turn_RR = torch.linalg.eigh((core_RR + core_RR.t()) / 2)
    kept_R = core_R > size * torch.finfo(torch.float64).eps * core_R.abs().max()
    root_IK = sketch_IR @ (turn_RR[:, kept_R] / core_R[kept_R].sqrt())
    vectors_IK, roots_K, _ = torch.linalg.svd(root_IK, full_matrices=False)
    padding = (0, rank - roots_K.numel())
    values_R = torch.nn.functional.pad(roots_K.square(), padding)
    missed = ((trace - values_R.sum()) / (size - rank)).clamp(min=0)
    total = core_R.abs().sum()
    negative = core_R.clamp(max=0).abs().sum() / total.clamp(min=torch.finfo(torch.float64).tiny)
    return values_R, torch.nn.functional.pad(vectors_IK, padding), missed, negative
