"""The one way out of the machine: push named files to the Hub, compare hashes afterwards, raise one type of error.

A push replaces what a branch shows but not its history: published weights stay reachable by their commit. A push
therefore goes to a new repository unless `update` says otherwise. `publishing` builds on this module.
"""

import glob
import hashlib
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import CommitInfo, HfApi, ModelInfo, get_token
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

from hf_unlearn.core.files import sha256_of
from hf_unlearn.core.published_files import PUBLISHED, TOKEN, matches, refuse_tokens
from hf_unlearn.core.push_options import PushOptions
from hf_unlearn.errors import PushError, SettingsError, UnlearningError

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

_WEIGHTS_OF_ANY_FORMAT = (
    "*.safetensors *.safetensors.index.json *.bin *.bin.index.json *.pt *.pth *.ckpt *.h5 *.msgpack *.gguf *.onnx"
).split()


def push_folder(
    folder: str | Path,
    repo_id: str,
    files: Sequence[str],
    options: PushOptions,
    *,
    flags: Sequence[str] = (),
) -> CommitInfo:
    """Upload `files` of `folder`, then compare the hash of each file on the Hub with the local one.

    Up to 250 files are uploaded in one commit, so a reader sees the old state or the new one. The repository is created
    only now. Running the same push again after a failure resumes it: what is already there is not sent again.

    Args:
        folder: Finished local folder.
        repo_id: `user/repo`, or `repo` of the user who owns the token.
        files: Relative paths.
        options: Visibility, token, branch, commit message, and whether a repository with other files may be updated.
        flags: Further flags of the command that resumes the push.

    Raises:
        PushError: Any failure between this machine and the Hub; the message gives the folder and the command that
            resumes.
        SettingsError: A file holds an access token, or `update` or `private` rule the repository out.
    """
    private, token, revision, update = options.private, options.token, options.revision, options.update
    message = options.commit_message or "Unlearned model"
    command = resume_command(folder, repo_id, flags, private=private, revision=revision, update=update)
    refuse_tokens(Path(folder), files, token)
    with one_failure(f"{folder} was not published as {repo_id}", command, token, str(folder)):
        if token is False or not (isinstance(token, str) or get_token()):
            raise ValueError("no access token: set HF_TOKEN, or run `hf auth login`")
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        before = _remote(api, repo_id, revision)
        _check_repository(before, Path(folder), files, repo_id, private, update)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            revision=revision,
            commit_message=message,
            allow_patterns=[glob.escape(name) for name in files],
            delete_patterns=[glob.escape(name) for name in _replaced(before, files)] if update else None,
        )
        wrong = _different(_remote(api, repo_id, commit.oid), Path(folder), files)
    if wrong:
        again = resume_command(folder, repo_id, flags, private=private, revision=revision, update=True)
        raise PushError(
            f"{repo_id} at {commit.oid[:12]} does not have the local content of {', '.join(wrong)}; everything is kept "
            f"in {folder}; resume with: {again}",
            str(folder),
            again,
        )
    return commit


def resume_command(folder: str | Path, repo_id: str, flags: Sequence[str] = (), **options: str | bool | None) -> str:
    """Return the shell command that makes the same push.

    >>> resume_command("out", "me/model", ["--yes"], private=True, revision=None)
    'hf-unlearn push out me/model --yes --private'
    """
    flags = list(flags)
    for name, value in options.items():
        if value:
            flags += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return shlex.join(["hf-unlearn", "push", str(folder), repo_id, *flags])


@contextmanager
def one_failure(what: str, command: str, token: str | bool | None = None, folder: str | None = None) -> Iterator[None]:
    """Turn any exception inside into one `PushError` of one line, without tokens and signed addresses.

    The client's own exceptions have no common base class (`HfHubHTTPError`, `ConnectionError`, `RuntimeError`,
    `ValueError`, those of the HTTP library), and their chain may show request headers, so it is dropped.
    """
    try:
        yield
    except UnlearningError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        if error.__cause__ is not None and not hasattr(error, "response"):  # the cause says more than the client does
            reason += f" {type(error.__cause__).__name__}: {error.__cause__}"
        reason = scrub(reason, token)
        kept = "; everything is kept there" if folder else ""
        raise PushError(f"{what} ({reason}){kept}; resume with: {command}", folder, command) from None


def scrub(message: str, token: str | bool | None = None) -> str:
    """Return a message as one line of at most 400 characters, without access tokens and queries of addresses.

    >>> scrub("no access:\\n https://host/file?signature=abc with hf_abcdefghijklmnopqrstuv")
    'no access: https://host/file with ***'
    """
    known = token if isinstance(token, str) else get_token()
    line = " ".join(message.split())
    line = line.replace(known, "***") if known else line
    line = re.sub(r"(https?://[^\s?'\"]*)\?[^\s'\"]*", r"\1", TOKEN.sub("***", line))
    return line if len(line) <= 400 else line[:397] + "..."


# The repository before and after


def _remote(api: HfApi, repo_id: str, revision: str | None) -> ModelInfo | None:
    """Return the files of a branch with their hashes, or None if the branch has no commit yet."""
    try:
        return api.model_info(repo_id, revision=revision, files_metadata=True)
    except (RevisionNotFoundError, EntryNotFoundError):
        return None


def _check_repository(
    before: ModelInfo | None, folder: Path, files: Sequence[str], repo_id: str, private: bool | None, update: bool
) -> None:
    """Raise `SettingsError` if the repository should be private but is public, or has other files already."""
    if before is None:
        return
    if private and not before.private:
        raise SettingsError(f"{repo_id} exists and is public; make it private on the Hub, or push to a new repository")
    present = [file.rfilename for file in before.siblings or [] if file.rfilename != ".gitattributes"]
    same = set(files) - set(_different(before, folder, files))
    others = [name for name in present if name not in same]
    if others and not update:
        raise SettingsError(
            f"{repo_id} has {len(others)} other files, such as {others[0]}, and what was published there stays "
            "reachable by its commit; push to a new repository, or pass update=True (--update) if that is intended"
        )


def _different(remote: ModelInfo | None, folder: Path, files: Iterable[str]) -> list[str]:
    """Return those of `files` whose content on the Hub is missing or not the local one."""
    siblings = {file.rfilename: file for file in (remote and remote.siblings) or []}
    return [name for name in files if name not in siblings or not _is_same(folder / name, siblings[name])]


def _is_same(path: Path, remote: "RepoSibling") -> bool:
    """Compare by hash: SHA-256 for large files, git's for small ones."""
    if remote.lfs is not None:
        return sha256_of(path) == remote.lfs.sha256
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == remote.blob_id


def _replaced(before: ModelInfo | None, files: Sequence[str]) -> list[str]:
    """Return the files of an older model that must not stay with the new ones, because a loader might take them."""
    present = [file.rfilename for file in (before and before.siblings) or []]
    weights = {n for n in present if any(fnmatchcase(Path(n).name, pattern) for pattern in _WEIGHTS_OF_ANY_FORMAT)}
    published = {name for name in present if any(matches(name, pattern) for pattern in PUBLISHED)}
    return [name for name in weights | published if name not in files]
