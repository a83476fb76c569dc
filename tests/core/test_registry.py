"""Laws of the registries: one entry per name or type, helpful errors, and types of a library that is imported later."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

from hf_unlearn.core.registry import Registry, TypeRegistry
from hf_unlearn.errors import SettingsError


def test_a_name_is_registered_once_and_can_be_removed() -> None:
    registry: Registry[int] = Registry("number")
    registry.add("one", 1)
    registry.add("one", 1)  # the same entry again changes nothing
    with pytest.raises(SettingsError, match="number 'one' is registered already"):
        registry.add("one", 2)
    registry.remove("one")
    registry.add("one", 2)
    assert dict(registry) == {"one": 2}


def test_an_unknown_name_is_an_error_that_gives_the_closest_name() -> None:
    registry: Registry[int] = Registry("number")
    registry.add("three", 3)
    with pytest.raises(SettingsError, match="unknown number 'thre'; did you mean 'three'"):
        registry.find("thre")


class Base:
    pass


class Derived(Base):
    pass


def test_derived_types_have_the_entry_of_their_closest_base() -> None:
    registry: TypeRegistry[str] = TypeRegistry("layer")
    registry.register(Base)("base")
    assert (registry.find(Base()), registry.find(Derived()), registry.find(3)) == ("base", "base", None)
    registry.add(Derived, "derived")
    assert (registry.find(Base()), registry.find(Derived())) == ("base", "derived")
    registry.remove(Base)
    assert registry.find(Base()) is None and registry.find(Derived()) == "derived"


def test_types_of_a_library_are_added_once_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    registry: TypeRegistry[str] = TypeRegistry("layer")
    seen: list[object] = []

    def register(instance: object) -> None:
        seen.append(instance)
        registry.add(Base, "late")

    registry.add_late("a_library_imported_later", register)
    assert registry.find(Base()) is None and not seen
    monkeypatch.setitem(sys.modules, "a_library_imported_later", ModuleType("a_library_imported_later"))
    assert registry.find(Derived()) == "late" and len(seen) == 1
    assert registry.find(Base()) == "late" and len(seen) == 1  # a known type does not ask again
