"""Laws of the files: a folder is completely old or completely new whenever its writer is stopped, and a writer that was
not killed leaves nothing else behind.

A folder's state is the stamp in each of its files. Writers are killed with SIGKILL at random moments, and at every one
of the moments that Python's audit events mark (each open, rename, chmod, removal, ... on the way). The negative control
is a writer that replaces the files one by one: the same kills catch it with stamps of both kinds.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from hf_unlearn.core import files
from hf_unlearn.core.files import check_output, replace_folder, sha256_of, write_json
from hf_unlearn.errors import OutputError

NAMES = ("config.json", "model.safetensors", "deep/notes.txt")
WRITERS = """
import os, signal, sys
from pathlib import Path
from hf_unlearn.core import files

NAMES = ("config.json", "model.safetensors", "deep/notes.txt")

def fill(folder, stamp):
    for name in NAMES:
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{stamp}\\n" * 200)

def careful(folder, stamp):
    with files.replace_folder(folder, overwrite=True) as new:
        fill(new, stamp)

writer = {"careful": careful, "naive": fill}[sys.argv[1]]
target = sys.argv[2]
"""
# Writes stamps 1, 2, 3, ... until killed.
ENDLESS = (
    WRITERS
    + """
stamp = int(sys.argv[3])
while True:
    writer(target, stamp)
    print(stamp, flush=True)
    stamp += 1
"""
)
# For k = 0, 1, 2, ... a fork of it writes stamp k and dies at its k-th audit event; ends with the first that survives.
# Prints the state after each: the stamps seen in the target and in what the two-rename fallback puts aside.
EVERY_MOMENT = (
    WRITERS
    + """
if sys.argv[3] == "fallback":
    files._exchange = lambda new, target: False
aside = Path(target).with_name("." + Path(target).name + ".replaced")

def stamps(folder):
    if not Path(folder).exists():
        return "missing"
    texts = [Path(folder, name).read_text() if Path(folder, name).exists() else "" for name in NAMES]
    return ",".join(sorted({text.splitlines()[0] if text.count("\\n") == 200 else "part" for text in texts}))

fill(target, 0)
for k in range(1, 1000):
    child = os.fork()
    if child == 0:
        events = 0
        def hook(event, args):
            global events
            events += 1
            if events == k:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        writer(target, k)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    print(k, stamps(target), stamps(aside), "survived" if status == 0 else "killed", flush=True)
    if status == 0:
        break
"""
)
posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


def fill(folder: Path, stamp: str) -> None:
    for name in NAMES:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{stamp}\n" * 200)


def stamps(folder: Path) -> set[str]:
    """Stamps in the folder's files; `part` for one that is missing or cut short."""
    texts = [(folder / name).read_text() if (folder / name).exists() else "" for name in NAMES]
    return {text.splitlines()[0] if text.count("\n") == 200 else "part" for text in texts}


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir() if path != folder)


@pytest.fixture(params=["exchange", "fallback"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Both ways to take the old folder's place: one system call where there is one, else two renames."""
    if request.param == "fallback":
        monkeypatch.setattr(files, "_exchange", lambda new, target: False)
    else:
        require_exchange(tmp_path)
    return request.param


def require_exchange(folder: Path) -> None:
    first, second = (Path(tempfile.mkdtemp(dir=folder)) for _ in range(2))
    exchanged = files._exchange(first, second)
    first.rmdir()
    second.rmdir()
    if not exchanged:
        pytest.skip("this file system cannot exchange two names")


# Whole or not at all


def test_a_new_folder_appears_whole_and_only_on_success(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with replace_folder(target) as new:
        fill(new, "new")
        assert not target.exists() and new.parent == target.parent
    assert stamps(target) == {"new"} and leftovers(target) == []


def test_an_old_folder_is_replaced_whole(tmp_path: Path, way: str) -> None:
    target = tmp_path / "out"
    fill(target, "old")
    (target / "stale.txt").write_text("old")
    with replace_folder(target, overwrite=True) as new:
        assert list(new.iterdir()) == []
        fill(new, "new")
        assert stamps(target) == {"old"}
    assert stamps(target) == {"new"} and not (target / "stale.txt").exists() and leftovers(target) == []


def test_an_empty_folder_is_filled_without_leave_to_overwrite(tmp_path: Path, way: str) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with replace_folder(target) as new:
        fill(new, "new")
    assert stamps(target) == {"new"} and leftovers(target) == []


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existed", [True, False])
def test_an_exception_leaves_the_old_folder_and_no_part_of_the_new(
    tmp_path: Path, way: str, error: type[BaseException], existed: bool
) -> None:
    target = tmp_path / "out"
    if existed:
        fill(target, "old")
    with pytest.raises(error), replace_folder(target, overwrite=True) as new:
        fill(new, "new")
        raise error
    assert leftovers(target) == []
    assert stamps(target) == {"old"} if existed else not target.exists()


@pytest.mark.parametrize("call", [1, 2])
def test_a_rename_that_fails_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int) -> None:
    target, calls = tmp_path / "out", []
    fill(target, "old")
    rename = os.rename

    def failing(*names: Path) -> None:
        calls.append(names)
        if len(calls) == call:
            raise PermissionError("not today")
        rename(*names)

    monkeypatch.setattr(files, "_exchange", lambda new, target: False)
    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(PermissionError, match="not today"), replace_folder(target, overwrite=True) as new:
        fill(new, "new")
    assert stamps(target) == {"old"} and leftovers(target) == [] and len(calls) >= call


def test_an_exchange_that_fails_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    fill(target, "old")

    def failing(new: Path, target: Path) -> bool:
        raise OutputError("cannot replace")

    monkeypatch.setattr(files, "_exchange", failing)
    with pytest.raises(OutputError), replace_folder(target, overwrite=True) as new:
        fill(new, "new")
    assert stamps(target) == {"old"} and leftovers(target) == []


def test_an_exchange_with_what_is_not_there_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    require_exchange(tmp_path)
    target = tmp_path / "out"
    fill(target, "old")
    with pytest.raises(OutputError, match="cannot replace"):
        files._exchange(tmp_path / "missing", target)
    assert stamps(target) == {"old"}


def test_a_link_to_a_folder_stays_a_link_and_its_folder_is_replaced(tmp_path: Path, way: str) -> None:
    (tmp_path / "disk").mkdir()
    real, link = tmp_path / "disk" / "out", tmp_path / "link"
    fill(real, "old")
    link.symlink_to(real)
    with pytest.raises(OutputError, match="not empty"), replace_folder(link) as new:
        fill(new, "new")
    with replace_folder(link, overwrite=True) as new:
        fill(new, "new")
    assert link.is_symlink() and stamps(real) == stamps(link) == {"new"}
    assert leftovers(real) == [] and leftovers(link) == ["disk"]


def test_the_new_folder_can_be_read_by_others(tmp_path: Path) -> None:
    with replace_folder(tmp_path / "out") as new:
        assert stat.S_IMODE(new.stat().st_mode) == 0o700  # while it is being written
        fill(new, "new")
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755


def test_two_writers_beside_each_other_do_not_mix(tmp_path: Path, way: str) -> None:
    target = tmp_path / "out"
    with replace_folder(target, overwrite=True) as one:
        fill(one, "one")
        with replace_folder(target, overwrite=True) as two:
            fill(two, "two")
        assert stamps(target) == {"two"}
    assert stamps(target) == {"one"} and leftovers(target) == []


# Kills


def moments(tmp_path: Path, writer: str, way: str) -> list[list[str]]:
    """(k, stamps of the target, stamps put aside, survived or killed), for a kill at every audit event."""
    command = [sys.executable, "-c", EVERY_MOMENT, writer, str(tmp_path / "out"), way]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return [line.split() for line in done.stdout.splitlines()]


@posix
def test_a_kill_at_any_moment_leaves_the_folder_whole(tmp_path: Path) -> None:
    require_exchange(tmp_path)
    kills = moments(tmp_path, "careful", "exchange")
    assert kills[-1][3] == "survived" and kills[-1][1] == kills[-1][0] and len(kills) > 20
    last = "0"
    for k, target, aside, _ in kills:
        assert target in (last, k) and aside == "missing"
        last = target
    changed = [k for k, target, _, how in kills if target == k and how == "killed"]
    assert 0 < len(changed) < len(kills) - 1  # kills fell before the exchange and after it


@posix
def test_without_an_exchange_a_kill_at_any_moment_leaves_a_whole_folder_in_place_or_aside(tmp_path: Path) -> None:
    kills = moments(tmp_path, "careful", "fallback")
    assert kills[-1][3] == "survived" and kills[-1][1] == kills[-1][0]
    last = "0"
    for k, target, aside, _ in kills:
        if target == "missing":  # between the two renames
            assert aside == last
        else:
            assert target in (last, k)
            last = target


@posix
def test_negative_control_files_replaced_one_by_one_are_caught_mixed(tmp_path: Path) -> None:
    kills = moments(tmp_path, "naive", "exchange")
    assert any("," in target or "part" in target for _, target, _, _ in kills)


@posix
def test_a_kill_at_a_random_moment_leaves_the_folder_whole(tmp_path: Path) -> None:
    require_exchange(tmp_path)
    target, chance, seen = tmp_path / "out", random.Random(0), []
    fill(target, "0")
    for attempt in range(10):
        start = 1000 * (attempt + 1)
        command = [sys.executable, "-c", ENDLESS, "careful", str(target), str(start)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout is not None and int(child.stdout.readline()) == start  # one is written
            time.sleep(chance.uniform(0.0, 0.03))
            child.send_signal(signal.SIGKILL)
        contents = stamps(target)
        assert len(contents) == 1 and "part" not in contents
        seen.append(int(contents.pop()))
        assert start <= seen[-1] < start + 1000
    assert len({stamp % 1000 for stamp in seen}) > 1  # not always the same moment


# Leave to write


def test_a_folder_with_something_in_it_needs_leave_to_be_overwritten(tmp_path: Path) -> None:
    target = tmp_path / "out"
    assert check_output(target) == target
    target.mkdir()
    assert check_output(target) == target
    fill(target, "old")
    with pytest.raises(OutputError, match="is not empty; choose another --output_dir or pass --overwrite_output_dir"):
        check_output(target)
    assert check_output(target, overwrite=True) == target


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_file_is_never_taken_for_the_output_folder(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="is a file; the output must be a folder"):
        check_output(tmp_path / "out", overwrite)
    with pytest.raises(OutputError), replace_folder(tmp_path / "out", overwrite):
        pytest.fail("it was opened")
    assert (tmp_path / "out").read_text() == "mine"


def test_without_leave_nothing_is_touched(tmp_path: Path) -> None:
    target = tmp_path / "out"
    fill(target, "old")
    with pytest.raises(OutputError), replace_folder(target):
        pytest.fail("it was opened")
    assert stamps(target) == {"old"} and leftovers(target) == []


# Single files


def test_json_is_written_whole_and_sorted(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content in ({"b": [1, 2.5, None], "a": "ü"}, {"c": True}):
        write_json(path, content)
        text = path.read_text(encoding="utf-8")
        assert json.loads(text) == content and text.endswith("}\n") and leftovers(path) == []
    write_json(path, {"b": 1, "a": 2})
    assert list(json.loads(path.read_text())) == ["a", "b"]


@pytest.mark.parametrize("content", [{"a": float("nan")}, {"a": [float("inf")]}, {"a": object()}])
def test_what_is_no_json_leaves_the_old_file_and_no_part_of_the_new(tmp_path: Path, content: dict) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": 1})
    with pytest.raises((ValueError, TypeError)):
        write_json(path, content)
    assert json.loads(path.read_text()) == {"a": 1} and leftovers(path) == []


def test_a_reader_never_sees_half_of_a_json_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, seen, replace = tmp_path / "a.json", [], os.replace
    write_json(path, {"a": 1})

    def watched(source: Path, target: Path) -> None:
        seen.extend(json.loads(Path(p).read_text()) for p in (target, source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    write_json(path, {"a": 2})
    assert seen == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("size", [0, 5, 3 << 20])
def test_sha256_is_that_of_the_bytes(tmp_path: Path, size: int) -> None:
    content = random.Random(1).randbytes(size)
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(content + b"x")
    assert sha256_of(tmp_path / "a") == hashlib.sha256(content).hexdigest() != sha256_of(tmp_path / "b")
