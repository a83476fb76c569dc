"""The constraints by name."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from hf_unlearn.constraints.base import Constraint, ConstraintLike
from hf_unlearn.core.registry import Registry
from hf_unlearn.core.settings import is_number, require_numbers
from hf_unlearn.errors import SettingsError

CONSTRAINTS: Registry[type[Constraint] | None] = Registry("constraint", "hf_unlearn.constraints")
CONSTRAINTS.add("none", None)

ConstraintClass = TypeVar("ConstraintClass", bound=type[Constraint])


def register_constraint(name: str) -> Callable[[ConstraintClass], ConstraintClass]:
    """Class decorator: make a constraint available under `name` in settings, commands, estimates and grids.

    The class is a frozen dataclass; its fields are the settings. An example, a constraint that shrinks every step
    evenly:

    >>> from dataclasses import dataclass
    >>> from hf_unlearn import Constraint, build_constraint, register_constraint
    >>> from hf_unlearn.constraints.factors import Scale
    >>> @register_constraint("halve")
    ... @dataclass(frozen=True)
    ... class HalveConstraint(Constraint):
    ...     '''Half of each step, whatever the retain rows.'''
    ...     share: float = 0.5
    ...     def right(self, gram):
    ...         return Scale(gram.spectrum_I.new_full((gram.spectrum_I.numel(),), self.share))
    >>> build_constraint("halve", {"share": 0.25})
    HalveConstraint(share=0.25)
    >>> CONSTRAINTS.remove("halve")

    Raises:
        SettingsError: Another constraint has this name.
    """
    return CONSTRAINTS.register(name)


def needs_fisher(name: str) -> bool:
    """Return whether the statistics need Fishers for this constraint; raise `SettingsError` if it is unknown."""
    constraint_class = CONSTRAINTS.find(name)
    return constraint_class is not None and constraint_class.needs_fisher


def setting_names(name: str) -> list[str]:
    """Return the names of a constraint's settings; raise `SettingsError` if it is unknown."""
    constraint_class = CONSTRAINTS.find(name)
    return [field.name for field in fields(constraint_class)] if constraint_class else []  # type: ignore[arg-type]


def build_constraint(name: str, settings: Mapping[str, Any] | None = None) -> Constraint | None:
    """Return the constraint registered under `name`, with its settings; None for "none".

    >>> build_constraint("ridge", {"strength": 0.01})
    RidgeConstraint(strength=0.01)

    Raises:
        SettingsError: Unknown name, unknown setting, or a value of the wrong type or out of range.
    """
    constraint_class, known, values = CONSTRAINTS.find(name), setting_names(name), settings or {}
    for setting in values:
        if setting not in known:
            raise SettingsError(f"constraint {name!r} has no setting {setting!r}, only {', '.join(known) or 'none'}")
    if constraint_class is None:
        return None
    all_fields = fields(constraint_class)  # type: ignore[arg-type]
    numeric = {field.name for field in all_fields if is_number(field.default)}
    require_numbers(f"constraint {name!r}", {setting: values[setting] for setting in values if setting in numeric})
    return constraint_class(**values)


def constraint_for(layer: str, constraint: ConstraintLike) -> Constraint | None:
    """Return the constraint of one layer; in a mapping from name patterns the first pattern that matches wins.

    Raises:
        SettingsError: No pattern matches.
    """
    if not isinstance(constraint, Mapping):
        return constraint
    for pattern, constraint_or_none in constraint.items():
        if fnmatchcase(layer, pattern):
            return constraint_or_none
    raise SettingsError(f"no pattern of the constraint settings matches layer {layer}; add '*' as the last pattern")
