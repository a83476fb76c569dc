"""The YAML file of settings, as first argument or `--config`, and flags that are read before the others."""

from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from hf_unlearn.core.files import read_yaml
from hf_unlearn.errors import SettingsError


def is_settings_file(word: str) -> bool:
    """Whether an argument is the name of a YAML file."""
    return word.endswith((".yaml", ".yml"))


def take_settings_file(argv: list[str]) -> tuple[list[str], Path | None]:
    """Return the arguments without the settings file, which is the first argument or `--config`, and its path."""
    if argv and not argv[0].startswith("-"):
        return argv[1:], Path(argv[0])
    argv, name = take_flag(argv, "--config")
    return argv, Path(name) if name else None


def take_flag(argv: list[str], flag: str) -> tuple[list[str], str | None]:
    """Return the arguments without the first use of a flag and its value, and that value.

    >>> take_flag(["--loss", "npo", "--steps=3"], "--loss")
    (['--steps=3'], 'npo')
    >>> take_flag(["--loss", "npo", "--steps=3"], "--steps")
    (['--loss', 'npo'], '3')
    >>> take_flag(["--loss", "npo"], "--constraint")
    (['--loss', 'npo'], None)
    """
    for index, argument in enumerate(argv):
        name, _, value = argument.partition("=")
        if name == flag and (value or index + 1 < len(argv)):
            return argv[:index] + argv[index + 1 + (not value) :], value or argv[index + 1]
    return argv, None


def read_settings(path: Path, known: Iterable[str], command: str) -> dict[str, Any]:
    """Read a YAML file of settings.

    Raises:
        SettingsError: The file cannot be read or is not a mapping, or it has settings that are not in `known`.
    """
    content, names = read_yaml(path), sorted(known)
    if unknown := sorted(map(str, set(content) - set(names))):
        close = get_close_matches(unknown[0], names, n=1, cutoff=0.7)
        hint = f"did you mean {close[0]}? " if close else ""
        raise SettingsError(f"{path} has unknown settings: {', '.join(unknown)}; {hint}see {command} --help")
    return content
