"""The rank rule and the symmetric eigenproblems behind every constraint.

Shapes: I input features, O output features, N rows, K rank of the core gradient space, M = I - K.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from hf_unlearn.core.sharding import whole
from hf_unlearn.core.text import ShortRepr
from hf_unlearn.errors import SettingsError
from hf_unlearn.statistics.sketch import is_sketch, reconstruct, sketch_map

Spectrum = Literal["eigenvalues", "singular_values"]

FEW_ROWS = 0.5
"""Rows per feature up to which a decomposition is thin."""
SMALLEST_THIN = 256
"""Fewer features are always decomposed in full."""
SPARE = 16
"""How many directions beyond the rank a thin decomposition looks for."""


@dataclass(frozen=True, repr=False)
class Eigen(ShortRepr):
    """Eigendecomposition of a Gram matrix, largest first: `gram_II = vectors_II @ diag(values_I) @ vectors_II.T`.

    For a stack of Grams `[G, I, I]` (the blocks of a layer) values and vectors are stacked too. For a diagonal Gram,
    kept as a vector `[I]`, `vectors_II` is `[I]`: the index of the unit vector that belongs to each value.

    The decomposition of a sketch is thin: `[R]` values and `[I, R]` vectors. It is also thin if the Gram is that of few
    rows. No `I x I` matrix is made from a thin one.

    >>> eigen = eigendecomposition(torch.diag(torch.tensor([1.0, 3.0])))
    >>> eigen.values_I
    tensor([3., 1.], dtype=torch.float64)
    >>> eigen.rank(energy=0.7)
    1

    Attributes:
        values_I: Eigenvalues, clamped at zero.
        vectors_II: Eigenvectors, in columns.
        negative_share: What the clamp removed, as a share of the sum of absolute eigenvalues. Rounding leaves about
            1e-16; the subtraction of rows that were never added leaves percents.
        missed: Of a thin decomposition, the eigenvalue of all directions outside the vectors: the energy that a sketch
            misses, spread evenly over all I directions (`sketch.reconstruct`; the values include it), or zero.
    """

    values_I: Tensor
    vectors_II: Tensor
    negative_share: float
    missed: Tensor | None = None

    def to(self, device: torch.device | str) -> "Eigen":
        """Return it on `device` (a collective call if it is kept in shards)."""
        missed = None if self.missed is None else self.missed.to(device)
        vectors_II = whole(self.vectors_II).to(device)
        return replace(self, values_I=self.values_I.to(device), vectors_II=vectors_II, missed=missed)

    @property
    def spectrum_I(self) -> Tensor:
        """All I eigenvalues; of a thin decomposition those outside the vectors come last."""
        if self.missed is None:
            return self.values_I
        others = self.vectors_II.shape[-2] - self.values_I.shape[-1]
        return torch.cat([self.values_I, self.missed.unsqueeze(-1).expand(*self.missed.shape, others)], -1)

    @property
    def missed_share(self) -> float:
        """Share of the trace that a sketch misses; it bounds the sketch's error in any norm, relative to the trace."""
        if self.missed is None:
            return 0.0
        total = self.spectrum_I.sum().item()
        return self.missed.sum().item() * self.vectors_II.shape[-2] / total if total > 0 else 0.0

    def times_root(self, matrix_OI: Tensor) -> Tensor:
        """Return `matrix_OI @ root_II` in float32, with `gram_II = root_II @ root_II.T`.

        `|D @ root_II|^2 = tr(D gram_II D^T)` without the cancellation of the right-hand side: a constrained move is in
        directions where the Gram is small, and there the product with the root is exact to rounding even in float32.
        """
        matrix_OI, roots_I = matrix_OI.float(), self.values_I.sqrt().float()
        if self.diagonal:
            return matrix_OI * torch.zeros_like(roots_I).scatter(0, self.vectors_II, roots_I)
        vectors_II = self.vectors_II.float()
        if self.missed is None:
            return matrix_OI @ (vectors_II * roots_I.unsqueeze(-2))
        outside = self.missed.sqrt().float()[..., None, None]
        inside_OK = (matrix_OI @ vectors_II) * (roots_I.unsqueeze(-2) - outside)
        return outside * matrix_OI + inside_OK @ vectors_II.mT

    @property
    def diagonal(self) -> bool:
        """Whether the eigenvectors are unit vectors that are kept by index."""
        return not self.vectors_II.is_floating_point()

    def blocks(self) -> "list[Eigen]":
        """Return the decompositions of a stack one by one; a single one as a list of one."""
        if self.values_I.ndim == 1:
            return [self]
        missed = [None] * len(self.values_I) if self.missed is None else self.missed
        stacked = zip(self.values_I, self.vectors_II, missed, strict=True)
        return [replace(self, values_I=values, vectors_II=vectors, missed=m) for values, vectors, m in stacked]

    def rank(self, energy: float, spectrum: Spectrum = "eigenvalues", min_rank_share: float = 0.0) -> int:
        """Return `rank_for_energy`, but at most the number of vectors."""
        return min(rank_for_energy(self.spectrum_I, energy, spectrum, min_rank_share), self.values_I.shape[-1])

    def rounded(self) -> "Eigen":
        """Return the same with vectors in float32."""
        return self if self.diagonal else replace(self, vectors_II=self.vectors_II.float())


def eigendecomposition(gram_II: Tensor, rows: int | None = None) -> Eigen:
    """Decompose a symmetric matrix in float64: in float32 the steep spectra of real networks turn negative.

    >>> eigen = eigendecomposition(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
    >>> eigen.values_I.round(decimals=6)
    tensor([3., 1.], dtype=torch.float64)

    Args:
        gram_II: A symmetric matrix `[I, I]`, a stack `[G, I, I]`, a diagonal matrix as a vector `[I]`, or a sketch
            `[I, R + 1]` or `[G, I, R + 1]`.
        rows: How many rows it is the Gram of, if known. If they are far fewer than I, the decomposition is thin and
            takes `2 I^2 N` multiply-adds instead of an `eigh`. A Gram of higher rank is noticed and decomposed in full.
    """
    if is_sketch(gram_II.shape):
        blocks = [reconstruct(block) for block in (gram_II if gram_II.ndim == 3 else [gram_II])]
        values_R, vectors_IR, missed, negative = (torch.stack(values) for values in zip(*blocks, strict=True))
        if gram_II.ndim == 2:
            values_R, vectors_IR, missed = values_R[0], vectors_IR[0], missed[0]
        return Eigen(values_R, vectors_IR, negative.max().item(), missed)
    if rows is not None and gram_II.ndim == 2 and len(gram_II) >= SMALLEST_THIN and rows <= FEW_ROWS * len(gram_II):
        thin = _decomposed_in_span(gram_II.double(), rows)
        if thin is not None:
            return thin
    if gram_II.ndim == 1:
        values_I, vectors_II = gram_II.double().sort(descending=True, stable=True)
    else:
        values_I, vectors_II = torch.linalg.eigh(gram_II.double())
        values_I, vectors_II = values_I.flip(-1), vectors_II.flip(-1)
    return Eigen(values_I.clamp(min=0), vectors_II, _negative_share(values_I))


def _decomposed_in_span(gram_II: Tensor, rows: int) -> Eigen | None:
    """Return the eigenvalues above float64 rounding and their vectors, if the rank is at most `rows`; else None.

    Halko, Martinsson, Tropp, Finding structure with randomness, SIAM Review 2011, algorithms 4.1 and 5.3: the image of
    a random map with a few columns more than the rank is the range itself, up to rounding, and the Gram is decomposed
    there. `rows` may be wrong if rows were subtracted that were never added, so two things are checked: the eigenvalue
    after the `rows` largest is zero, and the trace is complete.
    """
    size, eps = len(gram_II), torch.finfo(torch.float64).eps
    image_IR = torch.sparse.mm(sketch_map(size, rows + SPARE, gram_II.device), gram_II).t()  # the Gram is symmetric
    basis_IR = torch.linalg.qr(image_IR).Q
    core_RR = basis_IR.t() @ (gram_II @ basis_IR)
    values_R, rotation_RR = torch.linalg.eigh((core_RR + core_RR.t()) / 2)
    values_R, sizes_R = values_R.flip(0), values_R.abs().sort(descending=True).values
    zero = size * eps * sizes_R[0]
    if sizes_R[rows] > zero or (gram_II.trace() - values_R.sum()).abs() > 1e-10 * sizes_R.sum():
        return None
    held = max(int((values_R > zero).sum()), 1)
    vectors_IK = basis_IR @ rotation_RR.flip(1)[:, :held]
    return Eigen(values_R[:held].clamp(min=0), vectors_IK, _negative_share(values_R), values_R.new_zeros(()))


def _negative_share(values_I: Tensor) -> float:
    total = values_I.abs().sum()
    return (values_I.clamp(max=0).abs().sum() / total).item() if total > 0 else 0.0


def numerical_rank(values_I: Tensor) -> int:
    """Return the number of eigenvalues above `I * eps * max`, the float64 rounding of a zero."""
    floor = values_I.numel() * torch.finfo(torch.float64).eps * values_I.max()
    return int((values_I > floor).sum())


def participation_share(values_I: Tensor) -> float:
    """Return the participation ratio `sum^2 / sum of squares` of eigenvalues over their number I.

    It says how many directions a Gram uses (for covariances: Gao et al., bioRxiv 214262, 2017): 1 if all eigenvalues
    are equal, 1 / I if one is not zero, 0 for a zero Gram.
    """
    values_I = values_I.double()
    squares = values_I.square().sum()
    return (values_I.sum().square() / squares / values_I.numel()).item() if squares > 0 else 0.0


def rank_for_energy(
    values_I: Tensor, energy: float, spectrum: Spectrum = "eigenvalues", min_rank_share: float = 0.0
) -> int:
    """Return the smallest rank K whose leading eigenvalues reach the share `energy` of the spectrum's sum.

    >>> values_I = torch.tensor([0.81, 0.16, 0.02, 0.01])
    >>> rank_for_energy(values_I, 0.8), rank_for_energy(values_I, 0.8, "singular_values")
    (1, 2)

    Args:
        values_I: Eigenvalues of a Gram matrix, descending, not negative.
        energy: Share in (0, 1]; 1 returns the full numerical rank.
        spectrum: `"eigenvalues"` sums the retained energy (Saha et al., GPM, ICLR 2021);
            `"singular_values"` sums their square roots, as the PGU authors' code does (WACV 2024, section 3.2).
        min_rank_share: K is at least this share of I (rounded down), but never above the numerical rank.

    Raises:
        SettingsError: `energy` outside (0, 1], `min_rank_share` outside [0, 1], or unknown `spectrum`.
    """
    check_energy(energy, spectrum, min_rank_share)
    full = numerical_rank(values_I)
    if energy == 1 or full == 0:
        return full
    weights = values_I[:full].sqrt() if spectrum == "singular_values" else values_I[:full]
    shares = weights.cumsum(0) / weights.sum()
    reached = int((shares < energy).sum()) + 1
    return min(full, max(reached, int(min_rank_share * values_I.numel())))


def check_energy(energy: float, spectrum: str, min_rank_share: float) -> None:
    """Raise `SettingsError` if `rank_for_energy` does not accept these values."""
    if not 0 < energy <= 1:
        raise SettingsError(f"energy must be in (0, 1], got {energy}; 1 protects the entire span of the retain inputs")
    if spectrum not in ("eigenvalues", "singular_values"):
        raise SettingsError(f"spectrum must be 'eigenvalues' or 'singular_values', got {spectrum!r}")
    if not 0 <= min_rank_share <= 1:
        raise SettingsError(f"min_rank_share must be in [0, 1], got {min_rank_share}")


def scale_for_share(values_K: Tensor, share: float) -> float:
    """Return the scale at which the mean of `1 / (1 + value / scale)` is `share`; infinite if `share` is 1 or more.

    It is also infinite without values.

    >>> round(scale_for_share(torch.tensor([2.0, 2.0]), share=0.5), 6)
    2.0

    Args:
        values_K: Eigenvalues above zero, in any order.
        share: Above 0.
    """
    from scipy.optimize import brentq  # slow to import, and not needed for help texts

    if share >= 1 or not len(values_K):
        return math.inf
    values = values_K.double().cpu().numpy()
    # brackets: half and twice the scale that the smallest and the largest value alone would need
    least, most = values.min() * share / (1 - share) / 2, values.max() * share / (1 - share) * 2

    def excess(log_scale: float) -> float:
        return float((1 / (1 + values / math.exp(log_scale))).mean()) - share

    return math.exp(brentq(excess, math.log(least), math.log(most)))


def leading_basis(
    gram_II: Tensor, energy: float, spectrum: Spectrum = "eigenvalues", min_rank_share: float = 0.0
) -> Tensor:
    """Return the orthonormal `basis_IK` of the core gradient space of `gram_II`.

    >>> gram_II = torch.diag(torch.tensor([1.0, 9.0]))
    >>> leading_basis(gram_II, energy=0.9).abs()
    tensor([[0.],
            [1.]], dtype=torch.float64)

    Args:
        gram_II: A Gram matrix `[I, I]`.
        energy, spectrum, min_rank_share: The rule for the rank, see `rank_for_energy`.

    Raises:
        SettingsError: As `rank_for_energy`.
    """
    eigen = eigendecomposition(gram_II)
    return eigen.vectors_II[:, : eigen.rank(energy, spectrum, min_rank_share)]
