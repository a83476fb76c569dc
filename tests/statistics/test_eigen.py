"""Laws of the rank rule: projectors, monotonicity, the two spectra, the floor, and what a subtraction leaves."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import dense_twin as reference
from hf_unlearn.errors import SettingsError
from hf_unlearn.statistics.eigen import (
    Eigen,
    eigendecomposition,
    leading_basis,
    numerical_rank,
    rank_for_energy,
)
from hf_unlearn.statistics.sums import add_products, mirror

quick = settings(max_examples=40, deadline=None, derandomize=True)
shapes = st.tuples(st.integers(1, 12), st.integers(1, 9), st.integers(0, 2**20))
energies = st.floats(0.01, 1.0)
spectra = st.sampled_from(["eigenvalues", "singular_values"])


def make_rows(n: int, size: int, seed: int) -> Tensor:
    """Rows with a spectrum that falls by 2 from feature to feature."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, size, dtype=torch.float64, generator=generator) * 0.5 ** torch.arange(size)


def gram_of(rows_NI: Tensor) -> Tensor:
    return rows_NI.T @ rows_NI / len(rows_NI)


@quick
@given(shapes, energies, spectra)
def test_the_basis_is_orthonormal_so_that_its_projector_is_idempotent(
    shape: tuple[int, int, int], energy: float, spectrum: str
) -> None:
    basis_IK = leading_basis(gram_of(make_rows(*shape)), energy, spectrum)
    torch.testing.assert_close(basis_IK.T @ basis_IK, torch.eye(basis_IK.shape[1], dtype=torch.float64))
    projector_II = basis_IK @ basis_IK.T
    torch.testing.assert_close(projector_II @ projector_II, projector_II)


def test_the_projector_of_a_basis_that_is_not_orthonormal_is_not_idempotent() -> None:
    basis_IK = leading_basis(gram_of(make_rows(9, 6, 0)), 0.9) * 1.01
    projector_II = basis_IK @ basis_IK.T
    assert not torch.allclose(projector_II @ projector_II, projector_II)


@quick
@given(shapes, energies, spectra)
def test_the_rank_is_the_smallest_that_reaches_the_energy_of_the_raw_rows(
    shape: tuple[int, int, int], energy: float, spectrum: str
) -> None:
    """Twin: the SVD of the rows themselves."""
    rows_NI = make_rows(*shape)
    projector_II = reference.energy_projector(rows_NI.numpy(), energy, spectrum)
    basis_IK = leading_basis(gram_of(rows_NI), energy, spectrum)
    np.testing.assert_allclose(torch.eye(shape[1]) - basis_IK @ basis_IK.T, projector_II, atol=1e-6)


def test_the_two_spectra_differ_and_singular_values_keep_more() -> None:
    values_I = torch.tensor([0.81, 0.16, 0.02, 0.01], dtype=torch.float64)
    assert rank_for_energy(values_I, 0.8, "eigenvalues") == 1  # 0.81 of 1
    assert rank_for_energy(values_I, 0.8, "singular_values") == 2  # (0.9 + 0.4) of 1.54 = 0.84
    assert rank_for_energy(values_I, 0.85, "singular_values") == 3


@quick
@given(shapes, energies, energies, spectra)
def test_the_rank_grows_with_the_energy(shape: tuple[int, int, int], a: float, b: float, spectrum: str) -> None:
    values_I = eigendecomposition(gram_of(make_rows(*shape))).values_I
    low, high = sorted((a, b))
    ranks = [rank_for_energy(values_I, energy, spectrum) for energy in (low, high, 1.0)]
    assert ranks == sorted(ranks)


def test_the_rank_does_change_with_the_energy() -> None:
    values_I = eigendecomposition(gram_of(make_rows(12, 9, 0))).values_I
    assert rank_for_energy(values_I, 0.1) < rank_for_energy(values_I, 0.99) < rank_for_energy(values_I, 1)


@quick
@given(shapes)
def test_energy_one_keeps_the_numerical_rank(shape: tuple[int, int, int]) -> None:
    n, size, _ = shape
    gram_II = gram_of(make_rows(*shape))
    assert leading_basis(gram_II, 1.0).shape == (size, min(n, size))
    assert numerical_rank(eigendecomposition(gram_II).values_I) == min(n, size)


def test_rounding_noise_is_not_rank() -> None:
    rows_NI = make_rows(3, 8, 1)
    gram_II = gram_of(rows_NI)
    noise_II = 1e-17 * torch.randn(8, 8, dtype=torch.float64)
    assert numerical_rank(eigendecomposition(gram_II + noise_II @ noise_II.T).values_I) == 3
    assert numerical_rank(eigendecomposition(gram_II + 1e-6 * torch.eye(8)).values_I) == 8  # a real direction is rank


def test_the_floor_lifts_the_rank_to_its_share_but_not_above_the_numerical_rank() -> None:
    values_I = eigendecomposition(gram_of(make_rows(6, 8, 2))).values_I
    free = rank_for_energy(values_I, 0.5)
    assert free < 4
    assert rank_for_energy(values_I, 0.5, min_rank_share=0.5) == 4
    assert rank_for_energy(values_I, 0.5, min_rank_share=0.6) == 4  # 4.8, rounded down
    assert rank_for_energy(values_I, 0.5, min_rank_share=1.0) == 6
    assert rank_for_energy(values_I, 0.999999, min_rank_share=0.1) > 1  # a floor, not a ceiling


def test_a_zero_gram_has_an_empty_basis() -> None:
    for energy in (0.5, 1.0):
        assert leading_basis(torch.zeros(4, 4), energy, min_rank_share=0.5).shape == (4, 0)


@quick
@given(st.lists(st.floats(-1, 1).filter(lambda v: abs(v) > 1e-3), min_size=1, max_size=8), st.integers(0, 99))
def test_the_negative_share_is_that_of_the_absolute_eigenvalues(values: list[float], seed: int) -> None:
    size = len(values)
    rotation_II = torch.linalg.qr(make_rows(size, size, seed) + torch.eye(size)).Q
    parts = eigendecomposition(rotation_II @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ rotation_II.T)
    share = sum(-v for v in values if v < 0) / sum(abs(v) for v in values)
    assert parts.negative_share == pytest.approx(share, abs=1e-12)
    assert (parts.values_I >= 0).all() and (parts.values_I.diff() <= 0).all()


def test_a_gram_of_real_rows_has_no_negative_share_and_prints_as_plus_zero() -> None:
    assert eigendecomposition(gram_of(make_rows(12, 6, 3))).negative_share < 1e-12
    assert str(eigendecomposition(torch.eye(3)).negative_share) == "0.0"
    assert eigendecomposition(-torch.eye(3)).negative_share == 1
    assert eigendecomposition(torch.zeros(3, 3)).negative_share == 0


def test_eigen_decomposes_in_float64_whatever_the_input() -> None:
    gram_II = gram_of(make_rows(12, 6, 4)).float()
    parts = eigendecomposition(gram_II)
    assert parts.values_I.dtype == parts.vectors_II.dtype == torch.float64
    rebuilt_II = parts.vectors_II @ torch.diag(parts.values_I) @ parts.vectors_II.T
    torch.testing.assert_close(rebuilt_II, gram_II.double(), atol=1e-12, rtol=0)


@pytest.mark.parametrize(
    ("energy", "spectrum", "share", "seen"),
    [
        (0.0, "eigenvalues", 0.0, "got 0.0"),
        (1.5, "eigenvalues", 0.0, "got 1.5"),
        (float("nan"), "eigenvalues", 0.0, "got nan"),
        (0.9, "variance", 0.0, "'variance'"),
        (0.9, "eigenvalues", -0.1, "got -0.1"),
        (0.9, "eigenvalues", 1.1, "got 1.1"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(energy: float, spectrum: str, share: float, seen: str) -> None:
    with pytest.raises(SettingsError, match=seen):
        leading_basis(torch.eye(3), energy, spectrum, share)


@pytest.mark.parametrize("size", [1, 5, 255, 256, 257, 1027])
def test_products_by_blocks_are_the_full_product(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    parts = [torch.randn(n, size, dtype=torch.float64, generator=generator) for n in (3, 40)]
    sums = torch.zeros(size, size, dtype=torch.float64)
    for rows in parts:
        add_products(sums, rows)
    unfinished = sums.clone()
    mirror(sums)
    all_rows = torch.cat(parts)
    torch.testing.assert_close(sums, all_rows.T @ all_rows, rtol=1e-13, atol=1e-12)
    assert torch.equal(unfinished.triu(), sums.triu())
    assert torch.equal(unfinished, sums) == (size < 256)  # the control: blocks below the diagonal were left out


WIDE = 300


def few_rows(kind: str, n: int = 40) -> tuple[Tensor, Tensor]:
    """Rows of 300 features, and the sign each has in the Gram."""
    generator = torch.Generator().manual_seed(0)
    rows_NI = torch.randn(n, WIDE, dtype=torch.float64, generator=generator)
    signs_N = torch.ones(n, dtype=torch.float64)
    if kind == "steep":
        rows_NI *= 10 ** torch.linspace(0, -5, n, dtype=torch.float64).unsqueeze(1)
    elif kind == "single features":
        rows_NI = torch.eye(WIDE, dtype=torch.float64)[torch.randperm(WIDE, generator=generator)[:n]] * rows_NI[:, :1]
    elif kind == "duplicates":
        rows_NI[n // 2 :] = rows_NI[: n - n // 2]
    elif kind == "indefinite":
        signs_N[-5:] = -1
    elif kind == "zero":
        rows_NI.zero_()
    return rows_NI, signs_N


def signed_gram(rows_NI: Tensor, signs_N: Tensor) -> Tensor:
    return (rows_NI.T * signs_N) @ rows_NI / len(rows_NI)


def assert_same(thin: Eigen, full: Eigen) -> None:
    """Equal spectra to float64 rounding, and equal spans of the eigenvectors above it."""
    scale = max(full.values_I[0].item(), 1e-300)
    torch.testing.assert_close(thin.spectrum_I / scale, full.spectrum_I / scale, rtol=0, atol=1e-13)
    assert thin.negative_share == pytest.approx(full.negative_share, abs=1e-13)
    assert thin.missed_share == 0
    for energy in (0.5, 0.99, 1.0):
        rank = full.rank(energy)
        assert thin.rank(energy) == rank
        thin_IK, full_IK = thin.vectors_II[:, :rank], full.vectors_II[:, :rank]
        torch.testing.assert_close(thin_IK.T @ thin_IK, torch.eye(rank, dtype=torch.float64), rtol=0, atol=1e-12)
        outside_IK = thin_IK - full_IK @ (full_IK.T @ thin_IK)
        assert (
            rank == 0 or torch.linalg.matrix_norm(outside_IK, 2) < 1e-5
        )  # eigenvectors are resolved to eigenvalues of 1e-10 of the largest
    step_OI = make_rows(5, WIDE, 7)
    torch.testing.assert_close(thin.times_root(step_OI).norm(), full.times_root(step_OI).norm())


@pytest.mark.parametrize("kind", ["random", "steep", "single features", "duplicates", "indefinite", "zero"])
def test_a_gram_of_few_rows_is_decomposed_in_their_span(kind: str) -> None:
    """Twin: the same in full."""
    rows_NI, signs_N = few_rows(kind)
    gram_II = signed_gram(rows_NI, signs_N)
    thin, full = eigendecomposition(gram_II, len(rows_NI)), eigendecomposition(gram_II)
    assert thin.vectors_II.shape[1] <= len(rows_NI) and full.vectors_II.shape[1] == WIDE
    assert (thin.negative_share > 0.01) == (kind == "indefinite")
    assert_same(thin, full)


@pytest.mark.parametrize("kind", ["random", "steep", "single features", "indefinite"])
@pytest.mark.parametrize("claimed", [1, 20, 39])
def test_a_gram_of_more_rows_than_claimed_is_decomposed_in_full(kind: str, claimed: int) -> None:
    gram_II = signed_gram(*few_rows(kind))
    assert eigendecomposition(gram_II, claimed).missed is None  # in full
    assert eigendecomposition(gram_II, 40).missed is not None
    assert eigendecomposition(gram_II + 1e-9 * gram_II.trace() / WIDE * torch.eye(WIDE), 40).missed is None


def test_what_a_subtraction_leaves_is_decomposed_thin_and_one_of_foreign_rows_in_full() -> None:
    rows_NI, _ = few_rows("random", 80)
    kept, foreign = rows_NI[40:], make_rows(40, WIDE, 5)
    left_II = rows_NI.T @ rows_NI - rows_NI[:40].T @ rows_NI[:40]
    thin = eigendecomposition(left_II, 40)
    assert thin.missed is not None
    assert_same(thin, eigendecomposition(kept.T @ kept))
    odd = eigendecomposition(rows_NI.T @ rows_NI - foreign.T @ foreign, 40)
    assert odd.missed is None and odd.negative_share > 1e-3


def test_many_rows_and_small_grams_are_decomposed_in_full() -> None:
    gram_II = signed_gram(*few_rows("random"))
    assert eigendecomposition(gram_II, WIDE // 2 + 1).missed is None
    assert eigendecomposition(gram_II[:255, :255], 40).missed is None
