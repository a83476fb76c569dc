"""The constraints by name."""

from collections.abc import Mapping
from dataclasses import fields
from fnmatch import fnmatchcase
from typing import Any

from hf_unlearn.constraints.base import Constraint, ConstraintLike
from hf_unlearn.constraints.energy import EnergyConstraint
from hf_unlearn.constraints.energy_ridge import EnergyRidgeConstraint
from hf_unlearn.constraints.kronecker import KroneckerConstraint
from hf_unlearn.constraints.ridge import RidgeConstraint
from hf_unlearn.core.settings import require_numbers
from hf_unlearn.errors import SettingsError

CONSTRAINTS: dict[str, type | None] = {
    "energy": EnergyConstraint,
    "ridge": RidgeConstraint,
    "energy_ridge": EnergyRidgeConstraint,
    "kronecker": KroneckerConstraint,
    "none": None,
}


def build_constraint(name: str, settings: Mapping[str, Any] | None = None) -> Constraint | None:
    """Constraint by its name in `CONSTRAINTS`.

    Raises:
        SettingsError: Unknown name, unknown setting, or a value that is no number or out of range.
    """
    if name not in CONSTRAINTS:
        raise SettingsError(f"unknown constraint {name!r}; choose from {', '.join(CONSTRAINTS)}")
    kind = CONSTRAINTS[name]
    known = [field.name for field in fields(kind)] if kind else []
    for setting in settings or {}:
        if setting not in known:
            raise SettingsError(f"constraint {name!r} has no setting {setting!r}, only {', '.join(known) or 'none'}")
    require_numbers(f"constraint {name!r}", {n: value for n, value in (settings or {}).items() if n != "spectrum"})
    return kind(**(settings or {})) if kind else None


def constraint_for(layer: str, constraint: ConstraintLike) -> Constraint | None:
    """The constraint of one layer; in a mapping of name patterns the first that matches wins.

    Raises:
        SettingsError: No pattern matches.
    """
    if not isinstance(constraint, Mapping):
        return constraint
    for pattern, chosen in constraint.items():
        if fnmatchcase(layer, pattern):
            return chosen
    raise SettingsError(f"no pattern of the constraint settings matches layer {layer}; add '*' as the last pattern")
