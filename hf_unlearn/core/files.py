"""Files and folders that are either completely old or completely new, even if the process is killed while writing."""

import ctypes
import errno
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_unlearn.core.text import one_line
from hf_unlearn.errors import OutputError, SettingsError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


def check_output(folder: str | os.PathLike, overwrite: bool = False) -> Path:
    """Return `folder` as a path; raise `OutputError` if writing it would replace files without permission.

    Args:
        folder: The folder to be written.
        overwrite: The user agrees to lose what is in it. Whatever is not a folder is never replaced.
    """
    target = check_folder(folder, "--output_dir", "the output")
    try:
        has_files = target.is_dir() and any(target.iterdir())
    except OSError as error:
        raise OutputError(f"{target} cannot be read ({error.strerror}); choose another --output_dir") from error
    if has_files and not overwrite:
        raise OutputError(f"{target} is not empty; choose another --output_dir or pass --overwrite_output_dir")
    return target


def check_folder(folder: str | os.PathLike, setting: str, what: str) -> Path:
    """Return `folder` as a path; raise `OutputError` if something other than a folder has its name.

    A link to a folder is a folder; a broken link is not. The same holds for the folders above it.

    >>> check_folder("/dev/null", "--cache_dir", "the cache")
    Traceback (most recent call last):
        ...
    hf_unlearn.errors.OutputError: /dev/null is a device; the cache must be a folder: choose another --cache_dir

    Args:
        folder: A folder that exists or is to be made.
        setting, what: The setting that names it and what it is for, for the error message.
    """
    target = Path(folder)
    for path in (target, *target.parents):
        if os.path.lexists(path):
            if not path.is_dir():
                raise OutputError(f"{path} is {_kind(path)}; {what} must be a folder: choose another {setting}")
            break
    return target


def _kind(path: Path) -> str:
    """Return what a path is that is not a folder, with its article."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return "a broken link" if path.is_symlink() else "not accessible"
    kinds = {stat.S_ISREG: "a file", stat.S_ISFIFO: "a FIFO", stat.S_ISSOCK: "a socket"}
    return next((kind for is_kind, kind in kinds.items() if is_kind(mode)), "a device")


@contextmanager
def replace_folder(folder: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder next to `folder`; on success it replaces `folder` in one rename.

    On an exception the new folder is removed and the old one is untouched. The content of the old folder is deleted
    only after the new one has its name.

    Raises:
        OutputError: `folder` is not empty and `overwrite` is false, or it is not a folder. This is checked before
            anything is written, and again when the new folder gets its name.
    """
    target = check_output(folder, overwrite).resolve()  # a link to a folder stays a link
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    except OSError as error:
        raise OutputError(f"{target} cannot be written ({error.strerror}); choose another --output_dir") from error
    try:
        yield partial
        os.chmod(partial, 0o755)  # mkdtemp makes it private
        _sync_tree(partial)
        _swap_in(partial, target, overwrite)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a name next to `path`; the file written there replaces `path` by a rename, so a reader sees old or new.

    Raises:
        OutputError: `path` is something other than a file, such as a folder or a device.
    """
    if os.path.lexists(path) and not path.is_file():
        raise OutputError(f"{path} is {'a folder' if path.is_dir() else _kind(path)} and not a file; move it away")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with open(partial, "rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: object) -> None:
    """Write `content` as JSON with sorted keys; a reader sees the old file or the new one.

    >>> path = Path(tempfile.mkdtemp()) / "a.json"
    >>> write_json(path, {"b": 1})
    >>> print(path.read_text(), end="")
    {
      "b": 1
    }
    """
    text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False)  # first, because it may raise
    with replace_file(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file that holds a mapping; raise `SettingsError` if it does not."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"cannot read settings {path}: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{path} is not a YAML mapping of settings")
    return content


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hexadecimal digits."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()


def _sync_tree(folder: Path) -> None:
    """Flush every file to the disk, so that the rename cannot be on it before the content is."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def _swap_in(new: Path, target: Path, overwrite: bool) -> None:
    """Give `new` the name `target`, and delete the folder that had the name.

    Raises:
        OutputError: Since `target` was checked, something other than a folder got its name or, without `overwrite`, a
            file came into it. What is there then stays as it is.
    """
    if not overwrite or not os.path.lexists(target):
        try:
            os.rename(new, target)  # replaces nothing but an empty folder
        except OSError as error:
            raise _appeared(target) from error
        return
    if target.is_symlink() or not target.is_dir():
        raise _appeared(target)
    if _exchange(new, target):  # `new` now is what had the name, which may have changed since the check
        if new.is_symlink() or not new.is_dir():
            _exchange(new, target)
            raise _appeared(target)
        shutil.rmtree(new)
        return
    old = target.with_name(f".{target.name}.replaced")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(target, old)
    try:
        if old.is_symlink() or not old.is_dir():
            raise _appeared(target)
        os.rename(new, target)
    except BaseException:
        os.rename(old, target)
        raise
    shutil.rmtree(old)


def _appeared(target: Path) -> OutputError:
    return OutputError(
        f"{target} has changed while the output was made: it is no longer a folder that may be replaced; it was left "
        "as it is, and the output was not written: choose another --output_dir"
    )


def _exchange(new: Path, target: Path) -> bool:
    """Swap two names in one system call and return True, or False if the platform has none (other than Linux).

    Two renames would leave a moment without a folder.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    failed = renameat2(_AT_FDCWD, os.fsencode(new), _AT_FDCWD, os.fsencode(target), _RENAME_EXCHANGE)
    if failed and ctypes.get_errno() not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        code = ctypes.get_errno()
        raise OutputError(code, f"cannot replace {target}: {os.strerror(code)}")
    return not failed
