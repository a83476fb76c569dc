"""Folders that are either wholly old or wholly new, whatever moment the process is killed at."""

import ctypes
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_unlearn.errors import OutputError, SettingsError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def check_output(folder: str | os.PathLike, overwrite: bool = False) -> Path:
    """Raise `OutputError` where writing `folder` would replace something that the user did not agree to lose."""
    target = Path(folder)
    if target.is_file():
        raise OutputError(f"{target} is a file; the output must be a folder: choose another --output_dir")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise OutputError(f"{target} is not empty; choose another --output_dir or pass --overwrite_output_dir")
    return target


@contextmanager
def replace_folder(folder: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `folder`; on success it takes the place of `folder` in one rename.

    On an exception the new folder is removed and the old one is untouched. What was in the old folder is deleted only
    after the new one has its name. Raises `OutputError` if `folder` is not empty and `overwrite` is false.
    """
    target = check_output(folder, overwrite).resolve()  # a link to a folder stays a link
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        yield beside
        os.chmod(beside, 0o755)  # mkdtemp makes it private
        _sync_tree(beside)
        _swap_in(beside, target)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a name beside `path`; the file written there takes its place by rename: a reader sees old or new."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield beside
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write `content` beside `path` and rename it into place: a reader sees the old file or the new one."""
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False)  # before any file is made: it may raise
    with replace_file(path) as beside:
        beside.write_text(text + "\n", encoding="utf-8")


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that is a mapping; raises `SettingsError` on any other."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"cannot read settings {path}: {str(error).splitlines()[0]}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{path} is not a YAML mapping of settings")
    return content


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _swap_in(new: Path, target: Path) -> None:
    if not target.exists():
        os.rename(new, target)
        return
    if _exchange(new, target):  # `new` now holds the old content
        shutil.rmtree(new)
        return
    old = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(target, old)
    try:
        os.rename(new, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old)


def _exchange(new: Path, target: Path) -> bool:
    """Swap two names in one system call where the platform has it (Linux); two renames would leave a gap."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    failed = renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE)
    if failed and ctypes.get_errno() not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        code = ctypes.get_errno()
        raise OutputError(code, f"cannot replace {target}: {os.strerror(code)}")
    return not failed
