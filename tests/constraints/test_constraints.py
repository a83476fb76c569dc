"""Laws of the constraints: each equals its dense twin and does what its docstring says; unconstrained steps do not."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import dense_twin as reference
from helpers import tiny as cases
from hf_unlearn.constraints.base import BoundConstraint
from hf_unlearn.constraints.binding import bind_constraints, resolve_constraints
from hf_unlearn.constraints.energy import EnergyConstraint
from hf_unlearn.constraints.energy_ridge import EnergyRidgeConstraint
from hf_unlearn.constraints.factors import Keep, Remove, Shrink, ShrinkThin
from hf_unlearn.constraints.kronecker import KroneckerConstraint
from hf_unlearn.constraints.registry import build_constraint, constraint_for
from hf_unlearn.constraints.ridge import RidgeConstraint
from hf_unlearn.errors import SettingsError, StatisticsError
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.statistics.eigen import eigendecomposition
from hf_unlearn.statistics.retain_statistics import LayerSums, RetainStatistics

quick = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**20)
O, I = 4, 6


def random_array(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


def make_statistics(rows_NI: np.ndarray, gradients_NO: np.ndarray | None = None, **changes: Any) -> RetainStatistics:
    """Statistics of one layer, `a`, from its raw input rows and output gradients."""
    fisher = {} if gradients_NO is None else {"a": torch.from_numpy(reference.gram_sum(gradients_NO))}
    values: dict[str, Any] = {
        "gram_sums": {"a": torch.from_numpy(reference.gram_sum(rows_NI))},
        "fisher_sums": fisher,
        "layers": {"a": LayerSums("a", O, False)},
        "positions": {"a": len(rows_NI)},
        "rows": len(rows_NI),
        "labels": len(rows_NI),
        "weights": "0",
        "data": "0",
    }
    return RetainStatistics(**(values | changes))


def bind(rows_NI: np.ndarray, constraint: Any, gradients_NO: np.ndarray | None = None) -> BoundConstraint:
    return bind_constraints(make_statistics(rows_NI, gradients_NO), constraint)["a"]


def apply(bound: BoundConstraint, step_OI: np.ndarray) -> np.ndarray:
    return bound(torch.from_numpy(step_OI)).numpy()


def close(a: np.ndarray, b: np.ndarray, tolerance: float = 3e-6) -> bool:
    """Equal up to the float32 in which the factors are held."""
    return bool(np.linalg.norm(a - b) <= tolerance * max(np.linalg.norm(b), 1e-3))


@quick
@given(seeds, st.integers(1, 9), st.floats(0.05, 1.0), st.sampled_from(["eigenvalues", "singular_values"]))
def test_energy_equals_its_twin_and_is_idempotent(seed: int, n: int, energy: float, spectrum: str) -> None:
    rows_NI, step_OI = random_array(n, I, seed=seed), random_array(O, I, seed=seed + 1)
    bound = bind(rows_NI, EnergyConstraint(energy, spectrum))  # type: ignore[arg-type]
    once = apply(bound, step_OI)
    assert close(once, step_OI @ reference.energy_projector(rows_NI, energy, spectrum), 1e-5)
    assert close(apply(bound, once), once)


@pytest.mark.parametrize("n", [2, 5])
def test_energy_one_leaves_nothing_in_the_span_of_the_rows(n: int) -> None:
    rows_NI, step_OI = random_array(n, I), random_array(O, I, seed=1)
    bound = bind(rows_NI, EnergyConstraint(1.0))
    assert isinstance(bound.right, Remove if n == 2 else Keep)
    allowed_OI = apply(bound, step_OI)
    assert np.linalg.norm(allowed_OI @ rows_NI.T) < 1e-5 * np.linalg.norm(step_OI @ rows_NI.T)
    assert np.linalg.norm(allowed_OI) > 0.1 * np.linalg.norm(step_OI)  # enough is left to unlearn with
    removed_OI, again_OI = step_OI - allowed_OI, allowed_OI - apply(bound, allowed_OI)
    assert np.linalg.norm(removed_OI) > 0.3 * np.linalg.norm(step_OI)
    assert np.linalg.norm(again_OI) < 1e-5 * np.linalg.norm(allowed_OI)


def test_energy_of_a_full_rank_gram_removes_every_step() -> None:
    assert not apply(bind(random_array(20, I), EnergyConstraint(1.0)), random_array(O, I)).any()


@quick
@given(seeds, st.integers(0, I))
def test_removing_a_basis_is_keeping_its_complement(seed: int, rank: int) -> None:
    vectors_II = torch.linalg.qr(torch.from_numpy(random_array(I, I, seed=seed))).Q
    step_OI = torch.from_numpy(random_array(O, I, seed=seed + 1))
    removed, kept = Remove(vectors_II[:, :rank])(step_OI), Keep(vectors_II[:, rank:])(step_OI)
    torch.testing.assert_close(removed, kept)
    if rank:
        assert not torch.allclose(removed, Keep(vectors_II[:, rank - 1 :])(step_OI))


@quick
@given(seeds, st.integers(1, 12), st.floats(1e-3, 10.0))
def test_ridge_equals_the_explicit_inverse(seed: int, n: int, strength: float) -> None:
    rows_NI, step_OI = random_array(n, I, seed=seed), random_array(O, I, seed=seed + 1)
    twin_OI = step_OI @ reference.shrinkage(rows_NI.T @ rows_NI / n, strength)
    assert close(apply(bind(rows_NI, RidgeConstraint(strength)), step_OI), twin_OI, 1e-5)


@pytest.mark.parametrize("wide", [40, 600])
@pytest.mark.parametrize("constraint", [EnergyConstraint(0.9), EnergyConstraint(1.0), RidgeConstraint(0.01)])
def test_few_rows_make_thin_factors_that_equal_the_twin(constraint: Any, wide: int) -> None:
    """600 features are decomposed in the span of the rows, 40 in full."""
    rows_NI, step_OI = random_array(12, wide), random_array(O, wide, seed=1)
    statistics = make_statistics(rows_NI)
    right: Any = bind_constraints(statistics, constraint)["a"].right
    assert (statistics.gram_eigen("a").missed is None) == (wide == 40)
    assert isinstance(right, ShrinkThin if isinstance(constraint, RidgeConstraint) else Remove)
    assert right.basis_IK.shape[1] <= 12
    if isinstance(constraint, RidgeConstraint):
        twin_II = reference.shrinkage(rows_NI.T @ rows_NI / 12, constraint.strength)
    else:
        twin_II = reference.energy_projector(rows_NI, constraint.energy, constraint.spectrum)
    assert close(right(torch.from_numpy(step_OI)).numpy(), step_OI @ twin_II, 1e-5)
    assert not close(step_OI, step_OI @ twin_II, 1e-3)
    rooted = right.root()
    assert close(rooted(rooted(torch.from_numpy(step_OI))).numpy(), step_OI @ twin_II, 1e-5)


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.float32, 0, 3e-7), (torch.bfloat16, 5e-4, 1e-2)])
def test_bases_are_kept_in_float32_because_half_precision_leaks(dtype: torch.dtype, least: float, most: float) -> None:
    """Share of a step that a basis rounded for storage leaves in the core space."""
    rows_NI, step_OI = random_array(200, 512), torch.from_numpy(random_array(64, 512, seed=1)).float()
    basis_IK = torch.linalg.qr(torch.from_numpy(rows_NI.T)).Q
    allowed_OI = Remove(basis_IK.to(dtype))(step_OI).double()
    leak = float((allowed_OI @ basis_IK).norm() / allowed_OI.norm())
    assert least <= leak < most


WIDE = 24


def energy_ridge_factors(rows_NI: np.ndarray, energy: float, free_share: float) -> tuple[np.ndarray, np.ndarray, int]:
    """Eigenvalues of the Gram (largest first), what of a step along each is let through, and how many are cut."""
    values_I, vectors_II = np.linalg.eigh(rows_NI.T @ rows_NI / len(rows_NI))
    bound = bind(rows_NI, EnergyRidgeConstraint(energy, free_share=free_share, max_participation=1))
    map_II = vectors_II.T @ apply(bound, vectors_II.T).T
    assert np.allclose(map_II, np.diag(np.diag(map_II)), atol=1e-5)
    cut = round(np.trace(np.eye(WIDE) - reference.energy_projector(rows_NI, energy)))
    return values_I[::-1], np.diag(map_II)[::-1], cut


@pytest.mark.parametrize("n", [WIDE - 6, 80])
@pytest.mark.parametrize(("energy", "free_share"), [(0.5, 0.5), (0.5, 0.7), (0.3, 0.95)])
def test_energy_ridge_is_the_cut_and_then_a_ridge_that_lets_the_free_share_through(
    n: int, energy: float, free_share: float
) -> None:
    """Zero on what is cut, one on what was never seen, and between them `1 / (1 + eigenvalue / scale)` with one scale;
    `free_share` in the mean over all that is left."""
    values_I, factors_I, cut = energy_ridge_factors(random_array(n, WIDE), energy, free_share)
    seen = min(n, WIDE)
    assert np.allclose(factors_I[:cut], 0, atol=1e-6) and np.allclose(factors_I[seen:], 1, atol=1e-5)
    assert np.isclose(factors_I[cut:].mean(), free_share, atol=1e-5)
    between_K = factors_I[cut:seen]
    scales_K = values_I[cut:seen] * between_K / (1 - between_K)
    assert len(between_K) > 2 and np.allclose(scales_K, scales_K[0], rtol=1e-3)
    assert np.ptp(between_K) > 1e-3  # the control: one factor for all would have that mean as well


def test_energy_ridge_freezes_all_seen_directions_if_enough_are_unseen() -> None:
    """8 of 24 directions were seen: the others are more than 0.7 of those that the cut leaves."""
    rows_NI = random_array(8, WIDE)
    _, factors_I, cut = energy_ridge_factors(rows_NI, 0.5, 0.7)
    assert 0 < cut < 8 and (WIDE - 8) / (WIDE - cut) >= 0.7
    assert np.allclose(factors_I, [0] * 8 + [1] * (WIDE - 8), atol=1e-5)
    assert not np.allclose(energy_ridge_factors(rows_NI, 0.5, 0.99)[1][cut:8], 0, atol=1e-2)  # the control


def test_energy_ridge_with_a_free_share_of_one_is_energy() -> None:
    rows_NI, step_OI = random_array(40, I), random_array(O, I)
    cut, other = (EnergyRidgeConstraint(0.7, free_share=share, max_participation=1) for share in (1, 0.7))
    ends = [apply(bind(rows_NI, constraint), step_OI) for constraint in (cut, EnergyConstraint(0.7))]
    assert np.allclose(*ends, atol=1e-6)
    assert not np.allclose(ends[0], apply(bind(rows_NI, other), step_OI), atol=1e-2)


def test_energy_ridge_is_ridge_if_inputs_have_no_leading_directions() -> None:
    """Where their median participation ratio is above a tenth of the width, all layers' maps are ridge's."""
    step_OI, seen = random_array(O, WIDE, seed=1), set()
    for falls in ((0.0, 0.0, 2.0), (0.0, 2.0, 2.0), (0.02, 0.5, 0.02), (0.5, 0.5, 0.0)):
        scales = {name: np.exp(-fall * np.arange(WIDE)) for name, fall in zip("abc", falls, strict=True)}
        inputs = {name: random_array(80, WIDE) * scale_I for name, scale_I in scales.items()}
        grams = {name: rows_NI.T @ rows_NI / 80 for name, rows_NI in inputs.items()}
        flat = np.median([np.trace(g_II) ** 2 / (g_II**2).sum() / WIDE for g_II in grams.values()]) > 0.1
        statistics = make_statistics(
            inputs["a"],
            layers={name: LayerSums(name, O, False) for name in "abc"},
            positions=dict.fromkeys("abc", 80),
            gram_sums={name: torch.from_numpy(reference.gram_sum(rows_NI)) for name, rows_NI in inputs.items()},
        )
        bound = bind_constraints(statistics, EnergyRidgeConstraint())
        always = bind_constraints(statistics, EnergyRidgeConstraint(max_participation=1))
        for name, gram_II in grams.items():
            twins = step_OI @ reference.shrinkage(gram_II, 0.003), apply(always[name], step_OI)
            assert [close(apply(bound[name], step_OI), twin_OI, 1e-4) for twin_OI in twins] == [flat, not flat]
        seen.add(bool(flat))
    assert seen == {True, False}
    by_layer = {"a": EnergyRidgeConstraint(), "*": EnergyRidgeConstraint(0.8)}  # each is resolved on its own layers
    resolved = resolve_constraints(statistics, by_layer)
    assert resolved == {"a": by_layer["a"], "b": RidgeConstraint(), "c": RidgeConstraint()}


def test_many_rows_make_a_dense_shrinkage() -> None:
    assert isinstance(bind(random_array(30, 40), RidgeConstraint()).right, Shrink)


def test_ridge_solves_its_minimisation() -> None:
    """At `D'` the gradient of `|D' - D|^2 + tr(D' gram D'^T) / (strength * mean_eig(gram))` is zero, and only there."""
    rows_NI, step_OI, strength = random_array(8, I), random_array(O, I, seed=1), 0.2
    gram_II = torch.from_numpy(rows_NI.T @ rows_NI / 8)

    def slope(solution_OI: Tensor) -> Tensor:
        solution_OI = solution_OI.clone().requires_grad_()
        price = torch.trace(solution_OI @ gram_II @ solution_OI.T) / (strength * torch.linalg.eigvalsh(gram_II).mean())
        objective = (solution_OI - torch.from_numpy(step_OI)).square().sum() + price
        return torch.autograd.grad(objective, solution_OI)[0].norm()

    solution_OI = bind(rows_NI, RidgeConstraint(strength))(torch.from_numpy(step_OI))
    assert slope(solution_OI) < 1e-4
    assert slope(1.01 * solution_OI) > 1e-2
    assert slope(torch.from_numpy(step_OI)) > 1


@quick
@given(seeds, st.floats(1e-2, 10.0), st.floats(1e-2, 10.0))
def test_kronecker_solves_the_kronecker_system(seed: int, strength_in: float, strength_out: float) -> None:
    rows_NI, gradients_NO = random_array(8, I, seed=seed), random_array(8, O, seed=seed + 1)
    step_OI = random_array(O, I, seed=seed + 2)
    bound = bind(rows_NI, KroneckerConstraint(strength_in, strength_out), gradients_NO)
    gram_II, fisher_OO = rows_NI.T @ rows_NI / 8, gradients_NO.T @ gradients_NO / 8
    twin_OI = reference.kronecker(step_OI, gram_II, fisher_OO, strength_in, strength_out)
    assert close(apply(bound, step_OI), twin_OI, 1e-5)
    one_sided_OI = step_OI @ reference.shrinkage(gram_II, strength_in)
    assert not close(apply(bound, step_OI), one_sided_OI, 1e-3)


@pytest.mark.parametrize("name", ["ridge", "kronecker"])
def test_a_huge_strength_allows_every_step_and_a_tiny_one_none_in_seen_directions(name: str) -> None:
    rows_NI, gradients_NO, step_OI = random_array(3, I), random_array(9, O), random_array(O, I, seed=2)
    names = ["strength"] if name == "ridge" else ["strength_in", "strength_out"]
    for strength in (1e9, float("inf")):
        free = bind(rows_NI, build_constraint(name, dict.fromkeys(names, strength)), gradients_NO)
        assert close(apply(free, step_OI), step_OI)
    strict = bind(rows_NI, build_constraint(name, {names[0]: 1e-9}), gradients_NO)
    allowed_OI = apply(strict, step_OI)
    assert np.linalg.norm(allowed_OI @ rows_NI.T) < 1e-5 * np.linalg.norm(step_OI @ rows_NI.T)
    if name == "ridge":  # unseen directions are free
        assert close(allowed_OI, step_OI @ reference.energy_projector(rows_NI, 1.0), 1e-5)
    usual_OI = apply(bind(rows_NI, build_constraint(name), gradients_NO), step_OI)
    assert np.linalg.norm(usual_OI @ rows_NI.T) > 1e-5 * np.linalg.norm(step_OI @ rows_NI.T)


def test_a_zero_gram_constrains_nothing() -> None:
    step_OI = random_array(O, I)
    zero = (EnergyConstraint(1.0), RidgeConstraint(1e-6), EnergyRidgeConstraint(1.0), KroneckerConstraint(1e-6, 1e-6))
    for constraint in zero:
        bound = bind(np.zeros((3, I)), constraint, np.zeros((3, O)))
        assert close(apply(bound, step_OI), step_OI)


def test_a_constraint_does_not_depend_on_the_scale_of_the_statistics() -> None:
    rows_NI, gradients_NO, step_OI = random_array(8, I), random_array(8, O), random_array(O, I, seed=2)
    for constraint in (EnergyConstraint(), RidgeConstraint(), EnergyRidgeConstraint(), KroneckerConstraint()):
        small, large = (apply(bind(s * rows_NI, constraint, s * gradients_NO), step_OI) for s in (1e-4, 1e3))
        assert close(small, large, 1e-5)


def test_layers_of_a_model_are_bound_with_their_shared_decomposition() -> None:
    statistics = collect_statistics(cases.tiny_llama(), cases.text_rows(2), fisher=True, progress=False)
    bound = bind_constraints(statistics, KroneckerConstraint())
    assert list(bound) == list(statistics.layers)
    q, k, o = (bound[f"model.layers.0.self_attn.{name}_proj"] for name in "qko")
    assert q.right is k.right and q.right is not o.right and q.left is not k.left


def test_the_first_pattern_that_matches_wins() -> None:
    energy, ridge = EnergyConstraint(), RidgeConstraint()
    patterns = {"*.q_proj": energy, "*.o_proj": None, "*.0.*": ridge, "*_proj": energy}
    assert constraint_for("model.0.q_proj", patterns) is energy
    assert constraint_for("model.0.o_proj", patterns) is None
    assert constraint_for("model.0.v_proj", patterns) is ridge
    assert constraint_for("model.0.q_proj", dict(reversed(patterns.items()))) is energy
    assert constraint_for("model.0.v_proj", dict(reversed(patterns.items()))) is energy
    assert constraint_for("anything", ridge) is ridge


def test_a_layer_without_a_matching_pattern_is_an_error() -> None:
    statistics = collect_statistics(cases.tiny_mlp(), cases.vector_rows(3), progress=False)
    with pytest.raises(SettingsError, match=r"matches layer second; add '\*' as the last pattern"):
        bind_constraints(statistics, {"first": EnergyConstraint()})
    assert list(bind_constraints(statistics, {"first": EnergyConstraint(), "*": None})) == ["first"]
    assert bind_constraints(statistics, None) == {}


@pytest.mark.parametrize("energy", [0, -0.1, 1.5, float("nan"), float("inf")])
def test_an_energy_out_of_range_is_refused(energy: float) -> None:
    with pytest.raises(SettingsError, match=rf"energy must be in \(0, 1\], got {energy}"):
        build_constraint("energy", {"energy": energy})


@pytest.mark.parametrize("setting", ["strength", "strength_in", "strength_out"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan")])
def test_a_strength_must_be_positive(setting: str, value: float) -> None:
    with pytest.raises(SettingsError, match=f"{setting} must be above 0, got {value}"):
        build_constraint("ridge" if setting == "strength" else "kronecker", {setting: value})


@pytest.mark.parametrize(
    ("name", "given", "seen"),
    [
        ("projection", {}, "unknown constraint 'projection'; choose from energy, energy_ridge, kronecker, none, ridge"),
        ("energy", {"strength": 1}, "'energy' has no setting 'strength', only energy, spectrum, min_rank_share"),
        ("energy", {"anchored": False}, "has no setting 'anchored'"),
        ("none", {"energy": 1}, "'none' has no setting 'energy', only none"),
        ("energy", {"spectrum": "both"}, "spectrum must be"),
        ("energy", {"min_rank_share": 2}, "min_rank_share must be in"),
        ("energy_ridge", {"free_share": 0}, r"free_share must be in \(0, 1\], got 0; 1 is energy alone"),
        ("energy_ridge", {"free_share": 1.1}, "free_share must be in"),
        ("energy_ridge", {"free_share": float("nan")}, "free_share must be in"),
        ("energy_ridge", {"energy": 2}, "energy must be in"),
        ("energy_ridge", {"free_share": "x"}, "free_share of constraint 'energy_ridge' must be a number, got 'x'"),
        ("kronecker", {"strength_out": None}, "strength_out of constraint 'kronecker' must be a number, got None"),
        ("energy", {"energy": True}, "energy of constraint 'energy' must be a number, got True"),
        ("energy_ridge", {"max_participation": 0}, r"max_participation must be in \(0, 1\], got 0; 1 always cuts"),
    ],
)
def test_unknown_names_and_settings_are_refused(name: str, given: dict, seen: str) -> None:
    with pytest.raises(SettingsError, match=seen):
        build_constraint(name, given)


def test_constraints_are_built_by_name() -> None:
    assert build_constraint("energy", {"energy": 0.5}) == EnergyConstraint(0.5)
    assert build_constraint("ridge") == RidgeConstraint()
    assert build_constraint("kronecker", {"strength_out": 1}) == KroneckerConstraint(strength_out=1)
    assert build_constraint("none") is None


def test_kronecker_without_a_fisher_says_how_to_get_one() -> None:
    with pytest.raises(StatisticsError, match="a has no Fisher; collect the statistics with fisher=True"):
        bind(random_array(3, I), KroneckerConstraint())
    bind(random_array(3, I), RidgeConstraint())


def test_statistics_without_rows_protect_nothing_and_are_refused() -> None:
    empty = make_statistics(np.zeros((1, I)), rows=0)
    with pytest.raises(StatisticsError, match="no row left"):
        bind_constraints(empty, EnergyConstraint())
    assert bind_constraints(empty, None) == {}


def test_negative_energy_is_clamped_with_one_warning() -> None:
    model, rows = cases.tiny_llama(), cases.text_rows(6)
    full, own, foreign = (
        collect_statistics(model, part, progress=False, fisher=True)
        for part in (rows, rows[:2], cases.text_rows(2, seed=9))
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bind_constraints(full - own, RidgeConstraint())
        assert caught == []
        bound = bind_constraints(full - foreign, RidgeConstraint())
    assert len(caught) == 1
    worst = max(full.gram_sums, key=lambda name: eigendecomposition((full - foreign).gram(name)).negative_share)
    assert f"of {worst} is negative after the subtraction" in str(caught[0].message)
    for constraint in bound.values():  # a shrinkage never enlarges, whatever was subtracted
        assert isinstance(constraint.right, Shrink)
        step_OI = torch.randn(5, len(constraint.right.matrix_II))
        assert constraint(step_OI).norm() <= step_OI.norm() * (1 + 1e-5)
