"""Plug-ins: Python modules of the user that register constraints, losses, metrics, attacks or layers.

`--plugin` imports them before flags are parsed, so that their names are known to help texts and checks.
"""

import os
import sys
import traceback
from hashlib import sha256
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from hf_unlearn.cli.settings_file import take_flag
from hf_unlearn.errors import SettingsError

FLAG = "--plugin"


def take_plugins(argv: list[str]) -> tuple[list[str], list[str]]:
    """Return the arguments without every `--plugin` and its value, and those values."""
    plugins: list[str] = []
    while True:
        argv, plugin = take_flag(argv, FLAG)
        if plugin is None:
            return argv, plugins
        plugins.append(plugin)


def plugin_flags(plugins: list[str]) -> list[str]:
    """Return the flags that name these plug-ins."""
    return [word for plugin in plugins for word in (FLAG, plugin)]


def import_plugin(plugin: str) -> ModuleType:
    """Import a plug-in: a Python file, or a module by its dotted name.

    Modules are also looked up in the current folder. A file is executed once in a process.

    Raises:
        SettingsError: There is no such file or module, or an error is raised while it is imported.
    """
    check_plugin(plugin)
    try:
        return _import_file(Path(plugin).resolve()) if _is_file(plugin) else _import_module(plugin)
    except Exception as error:
        raise SettingsError(
            f"plug-in {plugin!r} cannot be imported: {_reason(error)}; --debug shows the traceback"
        ) from error


def check_plugin(plugin: str) -> None:
    """Raise `SettingsError` if a plug-in is named as a file and there is no such file."""
    if _is_file(plugin) and not Path(plugin).is_file():
        raise SettingsError(f"there is no plug-in file {plugin!r}; {FLAG} takes a Python file or the name of a module")


def _is_file(plugin: str) -> bool:
    return plugin.endswith(".py") or os.sep in plugin


def _import_file(path: Path) -> ModuleType:
    name = f"{path.stem}_{sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file")
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while it is executed
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import_module(name: str) -> ModuleType:
    folder = os.getcwd()
    sys.path.insert(0, folder)  # a console script looks only where it is installed
    try:
        return import_module(name)
    finally:
        sys.path.remove(folder)


def _reason(error: Exception) -> str:
    """Return the error in one line, with the line of the code that raised it."""
    line = " ".join(str(error).split()) or "no message"
    if isinstance(error, SyntaxError):
        return f"SyntaxError: {line}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {line} ({Path(frame.filename).name}, line {frame.lineno})"
