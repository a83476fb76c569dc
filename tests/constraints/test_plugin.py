"""A constraint that is defined here goes everywhere a built-in one goes, without any edit in the package."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import nn

from helpers import tiny as cases
from hf_unlearn.constraints.base import Constraint
from hf_unlearn.constraints.binding import bind_constraints
from hf_unlearn.constraints.factors import Factor, Remove, by_block
from hf_unlearn.constraints.kronecker import KroneckerConstraint
from hf_unlearn.constraints.registry import CONSTRAINTS, build_constraint, needs_fisher, register_constraint
from hf_unlearn.constraints.step_constrainer import StepConstrainer, constrain_optimizer
from hf_unlearn.errors import SettingsError, StatisticsError
from hf_unlearn.models.trainable import freeze_unprotected
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.statistics.eigen import Eigen
from hf_unlearn.statistics.retain_statistics import RetainStatistics
from hf_unlearn.trainer.config import UnlearningConfig

NAME = "two_sided_projection"


@dataclass(frozen=True)
class TwoSidedProjection(Constraint):
    """Removes the leading directions on both sides: `(I - V V^T) D (I - U U^T)`.

    It differs from every built-in constraint: two-sided like kronecker, and anchored like energy.
    """

    directions: int = 4
    """How many leading directions are removed on each side."""

    needs_fisher: ClassVar[bool] = True
    anchored: ClassVar[bool] = True
    factor_share: ClassVar[float] = 0.25

    def right(self, gram: Eigen) -> Factor:
        return by_block(gram, lambda block: Remove(block.vectors_II[:, : self.directions].float()))

    def left(self, fisher: Eigen) -> Factor:
        return self.right(fisher)

    def protected_rank(self, gram: Eigen) -> int:
        return self.directions

    def sketch_shortfall(self, gram: Eigen) -> str | None:
        return None if self.directions <= gram.values_I.shape[-1] else "has too few directions"


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register_constraint(NAME)(TwoSidedProjection)
    yield
    CONSTRAINTS.remove(NAME)


@pytest.fixture(scope="module")
def statistics() -> RetainStatistics:
    return collect_statistics(cases.tiny_llama(), cases.text_rows(4), fisher=True, progress=False)


def leading(eigen: Eigen) -> torch.Tensor:
    return eigen.vectors_II[:, :4].double()


def test_it_is_built_by_name_with_its_settings() -> None:
    assert NAME in CONSTRAINTS and needs_fisher(NAME)
    assert build_constraint(NAME, {"directions": 2}) == TwoSidedProjection(2)
    assert TwoSidedProjection.summary().startswith("Removes the leading directions on both sides")
    with pytest.raises(SettingsError, match=f"'{NAME}' has no setting 'energy', only directions"):
        build_constraint(NAME, {"energy": 0.5})
    with pytest.raises(SettingsError, match=f"constraint '{NAME}' is registered already"):
        register_constraint(NAME)(KroneckerConstraint)


def test_it_is_bound_on_both_sides_of_each_layer(statistics: RetainStatistics) -> None:
    bound = bind_constraints(statistics, TwoSidedProjection())
    assert list(bound) == list(statistics.layers)
    for name, constraint in bound.items():
        step_OI = torch.randn(statistics.layers[name].outputs, len(statistics.gram(name)), dtype=torch.float64)
        allowed_OI = constraint(step_OI)
        assert constraint.anchored
        assert (allowed_OI @ leading(statistics.gram_eigen(name))).norm() < 1e-5 * step_OI.norm()
        assert (leading(statistics.fisher_eigen(name)).T @ allowed_OI).norm() < 1e-5 * step_OI.norm()
        assert allowed_OI.norm() > 0.1 * step_OI.norm()


def test_without_fishers_it_is_refused() -> None:
    without = collect_statistics(cases.tiny_llama(), cases.text_rows(2), progress=False)
    with pytest.raises(StatisticsError, match="has no Fisher; collect the statistics with fisher=True"):
        bind_constraints(without, TwoSidedProjection())


def test_sketches_that_lack_what_it_needs_are_warned_of() -> None:
    sketched = collect_statistics(
        cases.tiny_llama(), cases.text_rows(4), fisher=True, sketch_above=40, sketch_rank=20, progress=False
    )
    with pytest.warns(UserWarning, match="has too few directions; collect with a larger sketch_rank"):
        bind_constraints(sketched, TwoSidedProjection(directions=30))


def trained(statistics: RetainStatistics, constraint: Constraint | None) -> tuple[nn.Module, StepConstrainer]:
    model = cases.tiny_llama()
    freeze_unprotected(model, statistics.layers)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    constrain_optimizer(optimizer, model, statistics, constraint)
    for _ in range(5):
        optimizer.zero_grad()
        (-model(**cases.collate(cases.text_rows(2, seed=5))).loss).backward()
        optimizer.step()
    return model, optimizer.constrainer  # type: ignore[attr-defined]


def test_any_optimizer_obeys_it_and_the_drift_meter_measures_it(statistics: RetainStatistics) -> None:
    original = cases.tiny_llama()
    (model, constrainer), (free_model, free) = (trained(statistics, c) for c in (TwoSidedProjection(), None))
    for name in statistics.layers:
        basis_IK, basis_OK = leading(statistics.gram_eigen(name)), leading(statistics.fisher_eigen(name))
        for moved, law in ((model, True), (free_model, False)):
            move_OI = (moved.get_submodule(name).weight - original.get_submodule(name).weight).detach().double()
            inside = max((move_OI @ basis_IK).norm(), (basis_OK.T @ move_OI).norm()) / move_OI.norm()
            assert (inside < 1e-4) == law, name
    assert 0 < constrainer.drift().relative < 0.7 * free.drift().relative
    constrained_kl, free_kl = constrainer.drift().kl, free.drift().kl
    assert constrained_kl is not None and free_kl is not None and constrained_kl < 0.5 * free_kl


def test_a_run_can_be_configured_with_it(tmp_path: str) -> None:
    config = UnlearningConfig(str(tmp_path), constraint=NAME, constraint_settings={"directions": 3}, use_cpu=True)
    assert config.build_constraint() == TwoSidedProjection(3)
