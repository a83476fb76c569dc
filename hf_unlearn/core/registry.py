"""One registry for losses, constraints, metrics and attacks: entries by name, registered where they are defined.

A registry belongs to a package. Its first look-up imports every module of that package, so a new entry is one new file
that registers itself; no list elsewhere names it.
"""

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
        """Register `entry` under `name`; raises `SettingsError` where the name is taken."""
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
        """The entry of this name.

        Args:
            also: Further names that the caller accepts, for the error message.

        Raises:
            SettingsError: No entry of this name; the message names the closest one and all of them.
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
        """The entries, once every module of the package was imported."""
        if self._package is not None:
            package, self._package = import_module(self._package), None
            for module in iter_modules(package.__path__):
                import_module(f"{package.__name__}.{module.name}")
        return self._entries


def suggestion(name: str, known: list[str]) -> str:
    """The way out of an unknown name: the closest known one, and all of them."""
    close = get_close_matches(name, known, n=1, cutoff=0.7)
    return (f"did you mean {close[0]!r}? " if close else "") + f"choose from {', '.join(known)}"
