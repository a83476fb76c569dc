"""Registries of losses, constraints, metrics, attacks and layer types; entries are registered where they are defined.

A registry belongs to a package. Its first look-up imports every module of that package, so a new entry is one new file
with a decorator; no list elsewhere names it. `Registry` looks up names, `TypeRegistry` the types of objects.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from difflib import get_close_matches
from importlib import import_module
from pkgutil import iter_modules
from typing import Generic, TypeVar

from hf_unlearn.errors import SettingsError

Entry = TypeVar("Entry")
Registered = TypeVar("Registered")


class Registry(Mapping[str, Entry], Generic[Entry]):
    """A mapping from names to entries, in alphabetical order.

    >>> greetings: Registry[str] = Registry("greeting")
    >>> greetings.add("hello", "Hello!")
    >>> greetings.find("hello")
    'Hello!'
    >>> greetings.find("helo")
    Traceback (most recent call last):
        ...
    hf_unlearn.errors.SettingsError: unknown greeting 'helo'; did you mean 'hello'? choose from hello

    Args:
        what: What an entry is, in error messages.
        package: Dotted name of the package whose modules register entries when they are imported.
    """

    def __init__(self, what: str, package: str | None = None):
        self.what = what
        self._package = package
        self._entries: dict[str, Entry] = {}

    def add(self, name: str, entry: Entry) -> None:
        """Register `entry` under `name`; raise `SettingsError` if another entry has the name."""
        if name in self._entries and self._entries[name] is not entry:
            raise SettingsError(f"{self.what} {name!r} is registered already; choose another name")
        self._entries[name] = entry

    def register(self, name: str) -> Callable[[Registered], Registered]:
        """Decorator form of `add`; the decorated object is returned unchanged."""

        def decorate(entry: Registered) -> Registered:
            self.add(name, entry)  # type: ignore[arg-type]
            return entry

        return decorate

    def remove(self, name: str) -> None:
        """Remove the entry of this name, if there is one, such as one that a test registered."""
        self._entries.pop(name, None)

    def find(self, name: str, also: tuple[str, ...] = ()) -> Entry:
        """Return the entry of this name.

        Args:
            also: Further names that the caller accepts, for the error message.

        Raises:
            SettingsError: No entry has this name; the message gives the closest name and all names.
        """
        entries = self._loaded()
        if name not in entries:
            raise SettingsError(f"unknown {self.what} {name!r}; {suggestion(name, [*sorted(entries), *also])}")
        return entries[name]

    def __getitem__(self, name: str) -> Entry:
        return self._loaded()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._loaded()))

    def __len__(self) -> int:
        return len(self._loaded())

    def _loaded(self) -> dict[str, Entry]:
        """Return the entries, after every module of the package was imported."""
        if self._package is not None:
            package, self._package = self._package, None
            _import_modules_of(package)
        return self._entries


class TypeRegistry(Generic[Entry]):
    """Entries for the objects of a type and of the types derived from it; the closest base class counts.

    >>> sounds: TypeRegistry[str] = TypeRegistry("sound")
    >>> sounds.add(int, "one, two, three")
    >>> sounds.find(True), sounds.find("text")
    ('one, two, three', None)
    >>> sounds.add(int, "four")
    Traceback (most recent call last):
        ...
    hf_unlearn.errors.SettingsError: sound int is registered already; remove it first, or register a derived type

    Args:
        what: What an entry is, in error messages.
        package: Dotted name of the package whose modules register entries when they are imported.
    """

    def __init__(self, what: str, package: str | None = None):
        self.what = what
        self._package = package
        self._entries: dict[type, Entry] = {}
        self._late: dict[str, Callable[[object], None]] = {}

    def add(self, owner: type, entry: Entry) -> None:
        """Register `entry` for objects of type `owner`; raise `SettingsError` if the type has another entry."""
        self._load()  # the entries of the package come first, so a clash is reported where the second one is added
        if self._entries.get(owner, entry) is not entry:
            raise SettingsError(
                f"{self.what} {owner.__name__} is registered already; remove it first, or register a derived type"
            )
        self._entries[owner] = entry

    def add_late(self, library: str, register: Callable[[object], None]) -> None:
        """Add the entries for types of `library` when an object is looked up, without importing the library.

        Once the library is imported, `register` gets every object that has no entry; it may add entries for its type,
        or for others of the library's types. It is called often and must not add an entry twice.
        """
        self._late[library] = register

    def register(self, owner: type) -> Callable[[Registered], Registered]:
        """Decorator form of `add`; the decorated object is returned unchanged."""

        def decorate(entry: Registered) -> Registered:
            self.add(owner, entry)  # type: ignore[arg-type]
            return entry

        return decorate

    def remove(self, owner: type) -> None:
        """Remove the entry of this type, if there is one, such as one that a test registered."""
        self._entries.pop(owner, None)

    def find(self, instance: object) -> Entry | None:
        """Return the entry of the type of `instance` or of its closest base class that has one, or None."""
        self._load()
        if (entry := self._closest(type(instance))) is not None:
            return entry
        for library, register in self._late.items():
            if library in sys.modules:
                register(instance)
        return self._closest(type(instance))

    def __contains__(self, owner: type) -> bool:
        return owner in self._entries

    def _closest(self, owner: type) -> Entry | None:
        return next((self._entries[base] for base in owner.__mro__ if base in self._entries), None)

    def _load(self) -> None:
        if self._package is not None:
            package, self._package = self._package, None
            _import_modules_of(package)


def suggestion(name: str, known: list[str]) -> str:
    """Return the way out of an unknown name, for an error message: the closest known name, and all of them."""
    close = get_close_matches(name, known, n=1, cutoff=0.7)
    return (f"did you mean {close[0]!r}? " if close else "") + f"choose from {', '.join(known)}"


def _import_modules_of(name: str) -> None:
    """Import every module of a package, each of which registers its entries."""
    package = import_module(name)
    for module in iter_modules(package.__path__):
        import_module(f"{name}.{module.name}")
