"""Laws of output folders that are not folders: whatever else has the name is refused, and stays what it is.

The negative control of the checks is a folder, or a link to one, which is written. Devices are never used here.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hf_unlearn.core import files
from hf_unlearn.core.files import check_folder, check_output, replace_file, replace_folder, write_json
from hf_unlearn.errors import OutputError

Make = Callable[[Path], object]


@pytest.fixture
def sockets() -> Iterator[list[socket.socket]]:
    opened: list[socket.socket] = []
    yield opened
    for server in opened:
        server.close()


def make(kind: str, path: Path, sockets: list[socket.socket]) -> None:
    if kind == "a FIFO":
        os.mkfifo(path)
    elif kind == "a socket":
        server = socket.socket(socket.AF_UNIX)
        sockets.append(server)
        place = os.getcwd()
        os.chdir(path.parent)  # the name of a socket is at most 107 bytes long
        server.bind(path.name)
        os.chdir(place)
    elif kind == "a file":
        path.write_text("mine")
    elif kind == "a broken link":
        path.symlink_to(path.with_name("missing"))
    else:
        path.with_name("pointed at").write_text("mine")
        path.symlink_to(path.with_name("pointed at"))


KINDS = ("a FIFO", "a socket", "a file", "a broken link", "a link to a file")


def what_it_is(path: Path) -> tuple[int, int, int]:
    status = os.lstat(path)
    return stat.S_IFMT(status.st_mode), status.st_ino, status.st_size


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_a_folder_is_refused_before_anything_is_written(
    kind: str, overwrite: bool, tmp_path: Path, sockets: list[socket.socket]
) -> None:
    make(kind, tmp_path / "out", sockets)
    before, names = what_it_is(tmp_path / "out"), set(os.listdir(tmp_path))
    seen = kind.replace("link to a ", "")
    for refuse in (check_output, lambda path, overwrite: replace_folder(path, overwrite).__enter__()):
        with pytest.raises(OutputError, match=f"out is {seen}; the output must be a folder: choose another"):
            refuse(tmp_path / "out", overwrite)
        with pytest.raises(OutputError, match=f"out is {seen}; the output must be a folder"):
            refuse(tmp_path / "out" / "below" / "it", overwrite)
    assert what_it_is(tmp_path / "out") == before and set(os.listdir(tmp_path)) == names


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("was_there", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_appears_while_the_output_is_made_stays(
    kind: str,
    was_there: bool,
    overwrite: bool,
    exchange: bool,
    tmp_path: Path,
    sockets: list[socket.socket],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda new, target: False)
    target = tmp_path / "out"
    if was_there:
        target.mkdir()
    with pytest.raises(OutputError, match="has changed while the output was made"):
        with replace_folder(target, overwrite) as new:
            (new / "model").write_text("new")
            if was_there:
                target.rmdir()
            make(kind, target, sockets)
            before = what_it_is(target)
    assert what_it_is(target) == before
    assert not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("kind", ["a FIFO", "a file"])
def test_what_appears_between_the_last_check_and_the_exchange_is_put_back(
    kind: str, tmp_path: Path, sockets: list[socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, exchange, before = tmp_path / "out", files._exchange, []
    target.mkdir()

    def late(new: Path, name: Path) -> bool:
        if not before:
            target.rmdir()
            make(kind, target, sockets)
            before.append(what_it_is(target))
        return exchange(new, name)

    monkeypatch.setattr(files, "_exchange", late)
    with pytest.raises(OutputError, match="has changed while the output was made"):
        with replace_folder(target, overwrite=True) as new:
            (new / "model").write_text("new")
    assert what_it_is(target) == before[0] and not list(tmp_path.glob(".out*"))


def test_a_file_that_comes_into_the_empty_folder_is_not_lost_without_permission(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for overwrite in (False, True):
        try:
            with replace_folder(tmp_path / "out", overwrite) as new:
                (new / "model").write_text("new")
                (tmp_path / "out" / "mine").write_text("mine")
        except OutputError:
            assert not overwrite
        assert (tmp_path / "out" / "mine").is_file() != overwrite
        assert (tmp_path / "out" / "model").is_file() == overwrite


def test_folders_and_links_to_folders_are_written(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    for name in ("new", "deep/new", "folder", "link"):
        with replace_folder(tmp_path / name, overwrite=True) as new:
            (new / "model").write_text(name)
        assert (tmp_path / name / "model").read_text() == name
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("kind", ["a FIFO", "a socket", "a broken link", "a folder"])
def test_a_file_replaces_only_a_file(kind: str, tmp_path: Path, sockets: list[socket.socket]) -> None:
    path = tmp_path / "results.json"
    if kind == "a folder":
        path.mkdir()
    else:
        make(kind, path, sockets)
    before = what_it_is(path)
    with pytest.raises(OutputError, match=f"results.json is {kind} and not a file"):
        write_json(path, {})
    assert what_it_is(path) == before and os.listdir(tmp_path) == ["results.json"]
    with replace_file(tmp_path / "new.json") as partial:
        partial.write_text("{}")
    assert (tmp_path / "new.json").read_text() == "{}"


def test_a_folder_that_must_not_be_a_file_is_named_by_its_setting(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("mine")
    with pytest.raises(OutputError, match="cache is a file; the cache must be a folder: choose another --cache_dir"):
        check_folder(tmp_path / "cache", "--cache_dir", "the cache")
    assert check_folder(tmp_path / "new", "--cache_dir", "the cache") == tmp_path / "new"
