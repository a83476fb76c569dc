"""Laws of the sketches: linear in the Gram, below it, exact at low rank, with a known missed share, thin under every
constraint; and of stopping once the leading directions no longer change."""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers import dense_twin as reference
from helpers import tiny as cases
from hf_unlearn.constraints.base import BoundConstraint
from hf_unlearn.constraints.binding import bind_constraints
from hf_unlearn.constraints.energy import EnergyConstraint
from hf_unlearn.constraints.energy_ridge import EnergyRidgeConstraint
from hf_unlearn.constraints.factors import ShrinkThin
from hf_unlearn.constraints.kronecker import KroneckerConstraint
from hf_unlearn.constraints.ridge import RidgeConstraint
from hf_unlearn.errors import ModelError, SettingsError, StatisticsError
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.statistics.early_stop import EarlyStop, lost_energy
from hf_unlearn.statistics.eigen import Eigen, eigendecomposition, rank_for_energy
from hf_unlearn.statistics.retain_statistics import LayerSums, RetainStatistics
from hf_unlearn.statistics.serialisation import METADATA
from hf_unlearn.statistics.sketch import SIGNS, Sketching, add_sketch, image, is_sketch, sketch_map, sketch_of

quick = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**20)
SIZE, RANK = 60, 24


def make_rows(n: int, seed: int = 0, fall: float = 0.9, size: int = SIZE) -> Tensor:
    """Rows whose features fall off, in directions of their own."""
    generator = torch.Generator().manual_seed(seed)
    turn_II = torch.linalg.qr(
        torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    ).Q
    return torch.randn(n, size, dtype=torch.float64, generator=generator) * fall ** torch.arange(size) @ turn_II


def gram_of(rows_NI: Tensor) -> Tensor:
    return rows_NI.T @ rows_NI


def rebuilt(parts: Eigen) -> Tensor:
    vectors_IR = parts.vectors_II.double()
    return vectors_IR @ torch.diag(parts.values_I) @ vectors_IR.T


def below(parts: Eigen) -> Tensor:
    """The approximation itself, without what it has missed."""
    return rebuilt(replace(parts, values_I=parts.values_I - parts.missed))


def map_twin(size: int, rank: int) -> np.ndarray:
    """The map, dealt out sign by sign from the stated hash."""
    stream = hashlib.shake_256(f"hf_unlearn sketch 1 of {size}".encode()).digest(8 * SIGNS * size)
    keys = [int.from_bytes(stream[i : i + 8], "little", signed=True) for i in range(0, len(stream), 8)]
    dense_IR = np.zeros((size, rank))
    for start in range(0, len(keys), size):
        own = keys[start : start + size]
        for place, feature in enumerate(sorted(range(size), key=own.__getitem__)):
            dense_IR[feature, place % rank] += 1 if own[place] % 2 else -1
    return dense_IR


@pytest.mark.parametrize(("size", "rank"), [(60, 24), (60, 20), (61, 60), (7, 3)])
def test_the_map_is_the_documented_one(size: int, rank: int) -> None:
    """A changed map would invalidate every saved sketch."""
    rows_NI = make_rows(5, size=size)
    np.testing.assert_allclose(image(rows_NI, rank), rows_NI.numpy() @ map_twin(size, rank), atol=1e-12)
    np.testing.assert_array_equal(sketch_map(size, rank).to_dense().T, map_twin(size, rank))
    filled = np.abs(map_twin(size, rank)).sum(0)
    assert filled.max() <= SIGNS * -(-size // rank) and np.abs(map_twin(size, rank)).sum(1).max() <= SIGNS


@quick
@given(seeds, st.integers(1, 50), st.integers(1, 50))
def test_sketches_add_and_subtract_like_the_grams(seed: int, n: int, m: int) -> None:
    a, b = make_rows(n, seed), make_rows(m, seed + 1)
    both = sketch_of(gram_of(torch.cat([a, b])), RANK)
    torch.testing.assert_close(sketch_of(gram_of(a), RANK) + sketch_of(gram_of(b), RANK), both)
    torch.testing.assert_close(both - sketch_of(gram_of(b), RANK), sketch_of(gram_of(a), RANK), atol=1e-9, rtol=1e-9)
    assert not torch.allclose(both, sketch_of(gram_of(a), RANK))


def test_rows_are_added_as_they_come_and_by_features() -> None:
    rows_NI = make_rows(40)
    sums_IS = torch.zeros(SIZE, RANK + 1, dtype=torch.float64)
    own_IS = torch.zeros(15, RANK + 1, dtype=torch.float64)
    for part_NI in rows_NI.split(7):
        add_sketch(sums_IS, part_NI)
        add_sketch(own_IS, part_NI, slice(20, 35))
    torch.testing.assert_close(sums_IS, sketch_of(gram_of(rows_NI), RANK))
    torch.testing.assert_close(own_IS, sums_IS[20:35])


def test_the_decomposition_equals_its_dense_twin() -> None:
    gram_II = gram_of(make_rows(100)).numpy()
    map_IR = map_twin(SIZE, RANK)
    twin_II = gram_II @ map_IR @ np.linalg.pinv(map_IR.T @ gram_II @ map_IR) @ map_IR.T @ gram_II
    parts = eigendecomposition(sketch_of(torch.from_numpy(gram_II), RANK))
    np.testing.assert_allclose(below(parts), twin_II, atol=1e-8 * np.trace(gram_II))
    assert parts.missed is not None and parts.values_I.dtype == torch.float64
    missed = np.trace(gram_II - twin_II)
    assert parts.missed_share == pytest.approx(missed / np.trace(gram_II), rel=1e-6) and 0.01 < parts.missed_share < 0.2
    assert parts.missed.item() == pytest.approx(missed / SIZE, rel=1e-6)
    assert parts.spectrum_I.sum().item() == pytest.approx(np.trace(gram_II)) and len(parts.spectrum_I) == SIZE


@quick
@given(seeds, st.integers(1, RANK), st.integers(0, 40))
def test_a_sketch_is_exact_up_to_its_rank_also_after_a_subtraction(seed: int, n: int, m: int) -> None:
    rows_NI, gone_NI = make_rows(n, seed, 0.97), make_rows(m, seed + 1, 0.97)
    gram_II = gram_of(rows_NI)
    sketch_IS = sketch_of(gram_II + gram_of(gone_NI), RANK) - sketch_of(gram_of(gone_NI), RANK)
    parts = eigendecomposition(sketch_IS)
    assert (rebuilt(parts) - gram_II).norm() < 1e-6 * gram_II.trace() and parts.missed_share < 1e-6
    assert parts.negative_share < 1e-9


@quick
@given(seeds, st.integers(2 * RANK, 90), st.floats(0.7, 1.0))
def test_the_approximation_is_below_the_gram_and_the_missed_energy_bounds_its_error(
    seed: int, n: int, fall: float
) -> None:
    gram_II = gram_of(make_rows(n, seed, fall))
    parts = eigendecomposition(sketch_of(gram_II, RANK))
    error_II = gram_II - below(parts)
    assert torch.linalg.eigvalsh(error_II).min() > -1e-9 * gram_II.trace()
    bound = parts.missed_share * gram_II.trace()
    assert torch.linalg.matrix_norm(error_II, 2) <= error_II.norm() <= bound * (1 + 1e-6) + 1e-9 * gram_II.trace()
    best = torch.linalg.eigvalsh(gram_II)[: SIZE - RANK].sum()
    assert bound >= best * (1 - 1e-6) - 1e-9 * gram_II.trace()
    basis = parts.vectors_II[:, : parts.rank(0.7)]  # so that what is counted of a basis is at most what is in it
    counted = (parts.values_I - parts.missed)[: parts.rank(0.7)].sum()
    assert ((basis.T @ gram_II) * basis.T).sum() >= counted * (1 - 1e-9)
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64))


@pytest.mark.parametrize("fall", [0.9, 0.97, 1.0])
def test_a_gaussian_map_misses_as_much(fall: float) -> None:
    """The map of the paper, written out; the mean of twenty drawings."""
    gram_II = gram_of(make_rows(200, fall=fall)).numpy()
    rng, missed = np.random.default_rng(0), []
    for _ in range(20):
        map_IR = rng.normal(size=(SIZE, RANK))
        approximation_II = gram_II @ map_IR @ np.linalg.pinv(map_IR.T @ gram_II @ map_IR) @ map_IR.T @ gram_II
        missed.append(1 - np.trace(approximation_II) / np.trace(gram_II))
    ours = eigendecomposition(sketch_of(torch.from_numpy(gram_II), RANK)).missed_share
    assert ours == pytest.approx(np.mean(missed), rel=0.15)
    half = eigendecomposition(sketch_of(torch.from_numpy(gram_II), RANK // 2)).missed_share
    assert half > 1.15 * np.mean(missed)  # the control: a map of half the rank misses more


def test_a_larger_rank_misses_less() -> None:
    gram_II = gram_of(make_rows(100))
    shares = [eigendecomposition(sketch_of(gram_II, rank)).missed_share for rank in (6, 12, 24, 48)]
    assert shares == sorted(shares, reverse=True) and shares[0] > 5 * shares[-1] > 0


def test_a_subtraction_of_foreign_rows_is_seen() -> None:
    rows, foreign = make_rows(20), 3 * make_rows(20, 1)
    parts = eigendecomposition(sketch_of(gram_of(rows) - gram_of(foreign), RANK))
    assert parts.negative_share > 0.1 and (parts.values_I >= 0).all() and parts.missed_share >= 0
    assert eigendecomposition(torch.zeros(SIZE, RANK + 1)).values_I.tolist() == [0.0] * RANK


@pytest.mark.parametrize("spectrum", ["eigenvalues", "singular_values"])
def test_the_rank_rule_counts_what_was_missed(spectrum: Any) -> None:
    gram_II = gram_of(make_rows(100))
    exact, parts = eigendecomposition(gram_II), eigendecomposition(sketch_of(gram_II, RANK))
    blind = rank_for_energy(parts.values_I, 0.8, spectrum)
    assert exact.rank(0.8, spectrum) <= parts.rank(0.8, spectrum) and blind < parts.rank(0.8, spectrum)
    assert parts.rank(0.999, spectrum) == RANK < rank_for_energy(parts.spectrum_I, 0.999, spectrum)


def make_statistics(rows_NI: Tensor, sketched: bool, gradients_NO: Tensor | None = None) -> RetainStatistics:
    """Of one layer, `a`, with SIZE inputs and outputs."""
    sums = [gram_of(rows) for rows in (rows_NI, gradients_NO) if rows is not None]
    sums = [sketch_of(one, RANK) if sketched else one for one in sums]
    count = len(rows_NI)
    fisher = {"a": sums[1]} if gradients_NO is not None else {}
    return RetainStatistics(
        {"a": sums[0]}, fisher, {"a": LayerSums("a", SIZE, False)}, {"a": count}, count, count, "0", "0"
    )


def bound(
    rows_NI: Tensor, constraint: Any, sketched: bool = True, gradients_NO: Tensor | None = None
) -> BoundConstraint:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bind_constraints(make_statistics(rows_NI, sketched, gradients_NO), constraint)["a"]


STEP = make_rows(8, 5, 1.0)


@pytest.mark.parametrize("energy", [0.5, 0.9, 1.0])
@pytest.mark.parametrize("spectrum", ["eigenvalues", "singular_values"])
def test_energy_of_a_low_rank_gram_is_that_of_the_exact_one(energy: float, spectrum: Any) -> None:
    rows_NI = make_rows(15)
    allowed = bound(rows_NI, EnergyConstraint(energy, spectrum))(STEP)
    twin = STEP.numpy() @ reference.energy_projector(rows_NI.numpy(), energy, spectrum)
    np.testing.assert_allclose(allowed, twin, atol=1e-5)
    again = bound(rows_NI, EnergyConstraint(energy, spectrum))(allowed)
    torch.testing.assert_close(again, allowed, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("free_share", [0.5, 0.95, 1.0])
def test_energy_ridge_of_a_low_rank_gram_is_that_of_the_exact_one(free_share: float) -> None:
    """At 0.5 the directions that nobody has seen are enough, at 0.95 some of the others are free too."""
    rows_NI, constraint = make_rows(15), EnergyRidgeConstraint(0.5, free_share=free_share, max_participation=1)
    dense, thin = (bound(rows_NI, constraint, sketched) for sketched in (False, True))
    identity = torch.eye(SIZE)
    assert isinstance(thin.right, ShrinkThin)
    torch.testing.assert_close(thin(identity), dense(identity), atol=1e-4, rtol=1e-4)
    other = EnergyRidgeConstraint(0.5, free_share=0.98, max_participation=1)
    assert not torch.allclose(thin(identity), bound(rows_NI, other)(identity), atol=1e-2)


def test_ridge_and_kronecker_of_low_rank_are_the_dense_ones() -> None:
    rows_NI, gradients_NO = make_rows(15), make_rows(18, 3)
    step_OI = torch.randn(SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    gram, fisher = (gram_of(rows).numpy() for rows in (rows_NI, gradients_NO))
    twin_OI = step_OI.numpy() @ reference.shrinkage(gram, 0.1)
    np.testing.assert_allclose(bound(rows_NI, RidgeConstraint(0.1))(step_OI), twin_OI, atol=1e-4)
    twin_OI = reference.shrinkage(fisher, 0.3) @ twin_OI
    both = bound(rows_NI, KroneckerConstraint(0.1, 0.3), gradients_NO=gradients_NO)
    np.testing.assert_allclose(both(step_OI), twin_OI, atol=1e-4)
    assert isinstance(both.right, ShrinkThin) and isinstance(both.left, ShrinkThin)
    half = both.right.root()
    torch.testing.assert_close(half(half(step_OI)), both.right(step_OI), atol=1e-5, rtol=1e-4)


def test_missed_energy_is_spread_evenly_and_does_not_pass() -> None:
    """Against the exact ridge on a Gram that does not fit the sketch: by its objective, and by the size of the step."""
    rows_NI, ridge = make_rows(200, fall=0.95), RidgeConstraint(0.003)
    gram_II = gram_of(rows_NI)
    even = bound(rows_NI, ridge)
    assert isinstance(even.right, ShrinkThin) and even.right.outside < 0.1
    free = BoundConstraint(replace(even.right, outside=1.0), None, False)
    # the control: with all the missed energy outside, directions inside appear weaker than they are
    parts = eigendecomposition(sketch_of(gram_II, RANK))
    assert parts.missed is not None
    outside, scale = parts.missed * SIZE / (SIZE - RANK), 0.003 * gram_II.trace() / SIZE
    shrunk = (1 / (1 + (parts.values_I - parts.missed) / scale), 1 / (1 + outside.item() / scale.item()))
    apart = BoundConstraint(ShrinkThin(parts.vectors_II, *shrunk), None, False)

    def objective(step_OI: Tensor) -> float:
        price = ((step_OI @ gram_II) * step_OI).sum() / (0.003 * gram_II.trace() / SIZE)
        return float((price + (step_OI - STEP).square().sum()) / STEP.square().sum())

    exact = bound(rows_NI, ridge, sketched=False)(STEP)
    assert objective(exact) < objective(even(STEP)) < objective(apart(STEP)) < 1.1 * objective(exact)
    assert objective(free(STEP)) > 20
    assert even(STEP).norm() < exact.norm() < 0.2 * free(STEP).norm()


def drift(step_OI: Tensor, gram_II: Tensor) -> float:
    return float(((step_OI @ gram_II) * step_OI).sum() / step_OI.square().sum()) ** 0.5


@pytest.mark.parametrize(
    "constraint", [EnergyConstraint(0.8, "eigenvalues"), RidgeConstraint(0.03)], ids=lambda c: type(c).__name__
)
def test_a_sketch_that_misses_some_still_protects(constraint: Any) -> None:
    rows_NI = make_rows(200)
    gram_II = gram_of(rows_NI)
    exact, sketched = (drift(bound(rows_NI, constraint, one)(STEP), gram_II) for one in (False, True))
    assert 0.95 * exact < sketched < 2.5 * exact and sketched < 0.5 * drift(STEP, gram_II)


@pytest.mark.parametrize("missing", [False, True])
def test_the_drift_meters_root_has_the_right_square(missing: bool) -> None:
    """`|D root|^2 = tr(D gram D^T)`, for the full Gram if the sketch holds it, and for its trace always."""
    gram_II = gram_of(make_rows(100 if missing else 15))
    parts = eigendecomposition(sketch_of(gram_II, RANK)).rounded()
    root_II = parts.times_root(torch.eye(SIZE)).double()
    model_II = rebuilt(parts) + parts.missed * (torch.eye(SIZE) - parts.vectors_II @ parts.vectors_II.T)
    if not missing:
        assert ((STEP @ root_II).square().sum() / ((STEP @ gram_II) * STEP).sum()).item() == pytest.approx(1, abs=1e-4)
    assert (root_II @ root_II.T - model_II).norm() < 1e-4 * model_II.norm()
    assert root_II.square().sum().item() == pytest.approx(gram_II.trace().item(), rel=1e-4)


def test_no_square_matrix_is_made() -> None:
    """A Gram of 200 thousand features would take 320 GB."""
    size = 200_000
    rows_NI = torch.randn(6, size)
    sums_IS = torch.zeros(size, 9, dtype=torch.float64)
    add_sketch(sums_IS, rows_NI.double())
    parts = eigendecomposition(sums_IS).rounded()
    step_OI = torch.randn(2, size)
    for constraint in (EnergyConstraint(1.0), RidgeConstraint(1e-9)):
        allowed_OI = constraint.right(parts)(step_OI)
        assert (allowed_OI @ rows_NI.T).norm() < 1e-3 * (step_OI @ rows_NI.T).norm()
        assert parts.times_root(allowed_OI).norm() < 1e-3 * parts.times_root(step_OI).norm()


def test_a_warning_says_what_a_sketch_cannot_hold() -> None:
    wide, low = make_rows(100), make_rows(15)
    for constraint in (EnergyConstraint(0.9), RidgeConstraint()):
        with pytest.warns(UserWarning, match=r"the sketch of a holds \d+.\d% of its trace.*larger sketch_rank"):
            bind_constraints(make_statistics(0.98 * make_rows(200, fall=1.0), True), constraint)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            bind_constraints(make_statistics(low, True), constraint)
            bind_constraints(make_statistics(wide, False), constraint)
    with pytest.warns(UserWarning, match="energy 1.0"):
        bind_constraints(make_statistics(wide, True), EnergyConstraint(1.0))
    with pytest.warns(UserWarning, match="shrunk evenly"):  # without leading directions it is not cut
        bind_constraints(make_statistics(make_rows(200, fall=1.0), True), EnergyRidgeConstraint())


def collect(model: nn.Module, rows: Any, **options: Any) -> RetainStatistics:
    return collect_statistics(model, rows, progress=False, **options)


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return cases.tiny_llama().double()


SKETCHED: dict[str, Any] = {"sketch_above": 40, "sketch_rank": 20, "fisher": True}


def test_collecting_sketches_the_wide_ones_alone(llama: nn.Module) -> None:
    rows = cases.text_rows(7)
    exact, sketched = collect(llama, rows, fisher=True), collect(llama, rows, **SKETCHED)
    wide = [name for name, sums in sketched.gram_sums.items() if is_sketch(sums.shape)]
    assert wide == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]
    for name, sums in sketched.gram_sums.items():
        expected = sketch_of(exact.gram_sums[name], 20) if name in wide else exact.gram_sums[name]
        torch.testing.assert_close(sums, expected, rtol=1e-9, atol=1e-9)
    up = "model.layers.0.mlp.up_proj"
    torch.testing.assert_close(sketched.fisher_sums[up], sketch_of(exact.fisher_sums[up], 20), rtol=1e-4, atol=1e-9)
    in_passes = collect(llama, rows, **SKETCHED, max_memory=60_000)
    for name in wide:
        torch.testing.assert_close(in_passes.gram_sums[name], sketched.gram_sums[name], rtol=1e-12, atol=1e-12)


def test_statistics_with_sketches_subtract_save_and_load(llama: nn.Module, tmp_path: Path) -> None:
    rows = cases.text_rows(7)
    full, forget, retain = (collect(llama, part, **SKETCHED) for part in (rows, rows[:3], rows[3:]))
    name = "model.layers.1.mlp.down_proj"
    torch.testing.assert_close((full - forget).gram_sums[name], retain.gram_sums[name], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close((forget + retain).gram_sums[name], full.gram_sums[name], rtol=1e-9, atol=1e-9)
    folder = (full - forget).save_pretrained(tmp_path / "sketched")
    loaded = RetainStatistics.from_pretrained(folder, model=llama)
    assert torch.equal(loaded.gram_sums[name], (full - forget).gram_sums[name])
    assert json.loads((folder / METADATA).read_text())["format_version"] == 2
    assert loaded.matching_arguments == {"layers": None} | SKETCHED
    exact = collect(llama, rows).save_pretrained(tmp_path / "exact")
    assert json.loads((exact / METADATA).read_text())["format_version"] == 1  # older versions read it
    with pytest.raises(StatisticsError, match="belong to another model"):
        RetainStatistics.from_pretrained(folder, model=cases.tiny_llama(width=64))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for constraint in (EnergyConstraint(), RidgeConstraint(), KroneckerConstraint()):
            bind_constraints(loaded, constraint)


def test_only_sketches_of_one_kind_combine(llama: nn.Module) -> None:
    rows = cases.text_rows(3)
    one = collect(llama, rows, **SKETCHED)
    with pytest.raises(StatisticsError, match=r"a sketch of rank 20 here and exact there.*same sketch_above"):
        one - collect(llama, rows[:1], fisher=True)
    with pytest.raises(StatisticsError, match="rank 20 here and a sketch of rank 10 there"):
        one + collect(llama, rows, **(SKETCHED | {"sketch_rank": 10}))
    assert (one - collect(llama, rows[:1], **one.matching_arguments)).rows == 2


def test_the_summary_says_what_was_missed(llama: nn.Module) -> None:
    lines = collect(llama, cases.text_rows(40), sketch_above=40, sketch_rank=20).summary().splitlines()
    missed = {line.split()[0]: float(line.split()[-2]) for line in lines[2:]}
    wide = [name for name in missed if name.endswith("down_proj")]
    assert all(1e-3 < missed[name] < 0.9 for name in wide) and len(wide) == 2
    assert all(missed[name] == 0 for name in missed if name not in wide)
    assert all(">20" in line for line in lines if "down_proj" in line)


def test_blocks_are_sketched_one_by_one() -> None:
    blocks = [gram_of(make_rows(n, n)) for n in (10, 20)]
    parts = eigendecomposition(torch.stack([sketch_of(block, RANK) for block in blocks]))
    assert parts.vectors_II.shape == (2, SIZE, RANK)
    for block, gram_II in zip(parts.blocks(), blocks, strict=True):
        assert (rebuilt(block) - gram_II).norm() < 1e-6 * gram_II.trace()
    step = torch.stack([STEP, STEP])
    allowed = RidgeConstraint(0.1).right(parts)(step)
    for one, gram_II in zip(allowed, blocks, strict=True):
        np.testing.assert_allclose(one, STEP.numpy() @ reference.shrinkage(gram_II.numpy(), 0.1), atol=1e-4)


@pytest.mark.parametrize("given", [{"rank": 0}, {"rank": -3}, {"above": -1}])
def test_impossible_sketches_are_refused(given: dict[str, int]) -> None:
    with pytest.raises(SettingsError, match="sketch_rank must be at least 1"):
        Sketching(**given)
    assert Sketching(10, 20).shape((15, 15)) == (15, 15)  # no larger than the Gram itself


def test_wide_outputs_need_no_fisher_of_their_size() -> None:
    model = cases.tiny_mlp()
    model.second = nn.Linear(8, 20000)
    statistics = collect(model, cases.vector_rows(2), fisher=True, sketch_rank=16)
    assert statistics.fisher_sums["second"].shape == (20000, 17)
    with pytest.raises(ModelError, match="lower sketch_above"):
        collect(model, cases.vector_rows(2), fisher=True, sketch_above=None)


def test_lost_energy_is_zero_for_the_best_basis_and_that_of_the_rest_for_another() -> None:
    parts = eigendecomposition(gram_of(make_rows(100)))
    assert lost_energy(parts, parts.vectors_II[:, :5]) < 1e-12
    worst = parts.values_I[:5].sum() - parts.values_I[-5:].sum()
    assert lost_energy(parts, parts.vectors_II[:, -5:]) == pytest.approx((worst / parts.values_I.sum()).item())


def vectors(n: int, rank: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of an MLP in a subspace that two dozen rows have seen."""
    generator = torch.Generator().manual_seed(seed)
    base_KI = torch.randn(rank, 16, generator=torch.Generator().manual_seed(7))
    rows_NI = torch.randn(n, rank, generator=generator) @ base_KI
    return [{"pixel_values": row, "labels": 0} for row in rows_NI]


def test_collecting_stops_once_the_leading_directions_no_longer_change() -> None:
    model = cases.tiny_mlp(inputs=16)
    rows = vectors(512, 3)
    stopped = collect(model, rows, tolerance=0.02, batch_size=4)
    assert 8 <= stopped.rows < 512 and stopped.rows & (stopped.rows - 1) == 0
    assert stopped.settings["change"] <= 0.02 and stopped.settings["sampled_from"] == 512
    assert f"stopped at row {stopped.rows} of 512, change" in stopped.summary()
    longer = collect(model, rows, tolerance=1e-9, batch_size=4)
    assert longer.rows == 512 and "sampled_from" not in longer.settings and longer.settings["change"] > 1e-9
    assert "the last" in longer.summary()
    few = collect(model, rows[: stopped.rows], tolerance=0.9, batch_size=stopped.rows // 2)  # stops with the last row
    assert few.rows == stopped.rows and "sampled_from" not in few.settings and (few - few).rows == 0
    everything = eigendecomposition(collect(model, rows).gram("first"))
    basis_IK = eigendecomposition(stopped.gram("first")).vectors_II[:, : everything.rank(0.9)]
    assert lost_energy(everything, basis_IK) < 0.04  # what the change promised


def test_early_stopping_is_not_misled_by_sorted_rows() -> None:
    """The first half in three directions, the second in all others: in their own order the first would seem enough."""
    model = cases.tiny_mlp(inputs=16)
    rows = vectors(256, 3) + vectors(256, 16, 1)
    everything = eigendecomposition(collect(model, rows).gram("first"))

    def lost(statistics: RetainStatistics) -> float:
        eigen = eigendecomposition(statistics.gram("first"))
        return lost_energy(everything, eigen.vectors_II[:, : everything.rank(0.9)])

    assert lost(collect(model, rows, tolerance=0.02, batch_size=4)) < 0.05
    assert lost(collect(model, rows, max_rows=64)) > 0.2


def test_a_sample_does_not_subtract() -> None:
    model = cases.tiny_mlp(inputs=16)
    rows = vectors(512, 3)
    sample, forget = collect(model, rows, tolerance=0.02, batch_size=4), collect(model, rows[:2])
    with pytest.raises(StatisticsError, match=f"sample \\({sample.rows} of 512 rows"):
        sample - forget
    assert (sample + forget).rows == sample.rows + 2


@pytest.mark.parametrize(
    ("options", "seen"),
    [({"tolerance": 0.0}, "between 0 and 1, got 0.0"), ({"tolerance": 0.1, "max_memory": 2100}, "in one pass")],
)
def test_an_impossible_tolerance_is_refused(options: dict[str, Any], seen: str) -> None:
    with pytest.raises(SettingsError, match=seen):
        collect(cases.tiny_mlp(inputs=16), vectors(8, 3), **options)
    assert EarlyStop(0.1).change is None
