"""What may leave the machine, and the one way it does: named files only, one failure type, hashes compared after.

A push replaces what a branch shows, never what its history holds: weights once published stay reachable by their
commit. That is why a push goes to a new repository unless `update` says otherwise. `publish` builds on this module.
"""

import glob
import hashlib
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi, ModelInfo, get_token
from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

from hf_unlearn.core.files import sha256_of
from hf_unlearn.core.push_options import PushOptions
from hf_unlearn.errors import PushError, SettingsError, UnlearningError

WEIGHTS = (
    "model.safetensors", "model-[0-9]*-of-[0-9]*.safetensors", "model.safetensors.index.json",
    "adapter_model.safetensors", "adapter_model-[0-9]*-of-[0-9]*.safetensors", "adapter_model.safetensors.index.json",
)  # fmt: skip
_VOCABULARIES = (  # names that tokenizers of transformers give their files
    "vocab.json", "vocab.txt", "vocab.bpe", "vocab-src.json", "vocab-tgt.json", "target_vocab.json", "merges.txt",
    "bpe.codes", "dict.txt", "entity_vocab.json", "emoji.json", "byte_maps.json", "word_shape.json", "normalizer.json",
    "word_pronunciation.json", "prophetnet.tokenizer", "spiece.model", "spm.model", "spm_char.model", "source.spm",
    "target.spm", "sentencepiece.model", "sentencepiece.bpe.model",
)  # fmt: skip
PUBLISHED = (
    *WEIGHTS, "config.json", "generation_config.json", "adapter_config.json",
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    *_VOCABULARIES,
    "chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
    "preprocessor_config.json", "processor_config.json", "image_processor_config.json",
    "video_preprocessor_config.json", "README.md", "unlearning_report.json", "plots/*.png",
)  # fmt: skip
"""Patterns of the files of a model that are published, folder by folder: `*` does not reach into a subfolder."""
STATISTICS = ("statistics.safetensors", "statistics.json", "README.md")
"""Those of retain statistics, which go only where they are asked for."""
_OWN_CODE = ("configuration_*.py", "modeling_*.py", "tokenization_*.py", "processing_*.py", "image_processing_*.py")
_OLD_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt",
                "*.h5", "*.msgpack", "*.gguf", "*.onnx")  # fmt: skip
_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")


def publishable(folder: str | Path, patterns: Sequence[str] = PUBLISHED) -> list[str]:
    """Files of `folder` that may be published, as sorted relative paths; everything else stays.

    Modules of the model's own code are among them only where its configuration refers to such (`auto_map`).
    """
    root = Path(folder)
    if patterns is PUBLISHED and _has_own_code(root):
        patterns = (*patterns, *_OWN_CODE)
    found = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return sorted(path for path in found if any(_matches(path, pattern) for pattern in patterns))


def push_folder(
    folder: str | Path,
    repo_id: str,
    files: Sequence[str],
    options: PushOptions,
    *,
    flags: Sequence[str] = (),
) -> CommitInfo:
    """Upload `files` of `folder`, then compare the hash of each on the Hub with the local one.

    Up to 250 files go in one commit: a reader sees the old state or the new one. The repository is
    made only now. A re-run after any failure resumes: what is there already is not sent again.

    Args:
        folder: Finished local folder.
        repo_id: `user/repo`, or `repo` of the user whose token it is.
        files: Relative paths.
        options: Visibility, token, branch, commit message, and whether a repository with other files may be updated.
        flags: Further flags of the command that resumes.

    Raises:
        PushError: Whatever went wrong between here and the Hub; it names the folder and the command that resumes.
        SettingsError: A file that holds an access token, or a repository that `update` or `private` rule out.
    """
    private, token, revision, update = options.private, options.token, options.revision, options.update
    message = options.commit_message or "Unlearned model"
    command = resume_command(folder, repo_id, flags, private=private, revision=revision, update=update)
    _refuse_tokens(Path(folder), files, token)
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
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message,
            allow_patterns=[glob.escape(name) for name in files],
            delete_patterns=[glob.escape(name) for name in _replaced(before, files)] if update else None,
        )  # fmt: skip
        wrong = _different(_remote(api, repo_id, commit.oid), Path(folder), files)
    if wrong:
        again = resume_command(folder, repo_id, flags, private=private, revision=revision, update=True)
        raise PushError(
            f"{repo_id} at {commit.oid[:12]} does not have the local content of {', '.join(wrong)}; everything is kept "
            f"in {folder}; resume with: {again}", str(folder), again,
        )  # fmt: skip
    return commit


def resume_command(folder: str | Path, repo_id: str, flags: Sequence[str] = (), **options: str | bool | None) -> str:
    """The shell command that makes the same push."""
    flags = list(flags)
    for name, value in options.items():
        if value:
            flags += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return shlex.join(["hf-unlearn", "push", str(folder), repo_id, *flags])


@contextmanager
def one_failure(what: str, command: str, token: str | bool | None = None, folder: str | None = None) -> Iterator[None]:
    """Turn any exception within into one `PushError`, in one line and without tokens and signed addresses.

    The client's own exceptions share no base class (`HfHubHTTPError`, `ConnectionError`, `RuntimeError`, `ValueError`,
    those of the HTTP library), and their chain may show request headers: it is cut.
    """
    try:
        yield
    except UnlearningError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        if error.__cause__ is not None and not hasattr(error, "response"):  # the client's own words say less
            reason += f" {type(error.__cause__).__name__}: {error.__cause__}"
        reason = scrub(reason, token)
        kept = "; everything is kept there" if folder else ""
        raise PushError(f"{what} ({reason}){kept}; resume with: {command}", folder, command) from None


def scrub(message: str, token: str | bool | None = None) -> str:
    """One line of at most 400 characters, without access tokens and without the query of any address."""
    known = token if isinstance(token, str) else get_token()
    line = " ".join(message.split())
    line = line.replace(known, "***") if known else line
    line = re.sub(r"(https?://[^\s?'\"]*)\?[^\s'\"]*", r"\1", _TOKEN.sub("***", line))
    return line if len(line) <= 400 else line[:397] + "..."


# The repository before and after


def _remote(api: HfApi, repo_id: str, revision: str | None) -> ModelInfo | None:
    """Files with their hashes; None where the branch has no commit yet."""
    try:
        return api.model_info(repo_id, revision=revision, files_metadata=True)
    except (RevisionNotFoundError, EntryNotFoundError):
        return None


def _check_repository(
    before: ModelInfo | None, folder: Path, files: Sequence[str], repo_id: str, private: bool | None, update: bool
) -> None:
    """Raise `SettingsError` where the repository is public but was to be private, or is somebody's already."""
    if before is None:
        return
    if private and not before.private:
        raise SettingsError(f"{repo_id} exists and is public; make it private on the Hub, or push to a new repository")
    there = [f.rfilename for f in before.siblings or [] if f.rfilename != ".gitattributes"]
    same = set(files) - set(_different(before, folder, files))
    others = [name for name in there if name not in same]
    if others and not update:
        raise SettingsError(
            f"{repo_id} has {len(others)} other files, such as {others[0]}, and what was published there stays "
            "reachable by its commit; push to a new repository, or pass update=True (--update) if that is intended"
        )


def _different(remote: ModelInfo | None, folder: Path, files: Iterable[str]) -> list[str]:
    """Those of `files` that the Hub does not have with the local content: SHA-256 of large files, git's of small."""
    siblings: Mapping[str, Any] = {f.rfilename: f for f in (remote and remote.siblings) or []}
    return [name for name in files if name not in siblings or not _is_same(folder / name, siblings[name])]


def _is_same(path: Path, remote: Any) -> bool:
    if remote.lfs is not None:
        return sha256_of(path) == remote.lfs.sha256
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest() == remote.blob_id


def _replaced(before: ModelInfo | None, files: Sequence[str]) -> list[str]:
    """Files of an older model that must not stay beside the new ones: a loader might take them."""
    there = [f.rfilename for f in (before and before.siblings) or []]
    old = [name for name in there if any(fnmatchcase(Path(name).name, pattern) for pattern in _OLD_WEIGHTS)]
    return [name for name in {*old, *(n for n in there if any(_matches(n, p) for p in PUBLISHED))} if name not in files]


# The files


def _matches(path: str, pattern: str) -> bool:
    """As fnmatch, but folder by folder."""
    parts, patterns = path.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))


def _has_own_code(folder: Path) -> bool:
    names = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
    found = (folder / name for name in names if (folder / name).is_file())
    return any('"auto_map"' in path.read_text(encoding="utf-8") for path in found)


def _refuse_tokens(folder: Path, files: Iterable[str], token: str | bool | None) -> None:
    """Raise `SettingsError` if a text file to be published holds the token in use, or looks to hold another one."""
    known = token if isinstance(token, str) else get_token()
    for name in files:
        if name.endswith((".safetensors", ".png")):
            continue
        content = (folder / name).read_text(encoding="utf-8", errors="replace")
        if (known and known in content) or _TOKEN.search(content):
            raise SettingsError(f"{folder / name} holds an access token; remove it, and revoke it if it was shown")


# History


@dataclass(frozen=True)
class PurgeReport:
    """What `purge_history` removed, and what it could not.

    Attributes:
        repo_id: The repository.
        deleted: Names of the large files whose content was deleted.
        remaining: Names of large files outside of the branch's head that are still listed.
        branches, tags: Other refs by name.
        pull_requests: Refs of pull requests; no interface deletes them.
    """

    repo_id: str
    deleted: tuple[str, ...]
    remaining: tuple[str, ...]
    branches: tuple[str, ...]
    tags: tuple[str, ...]
    pull_requests: tuple[str, ...]

    def __str__(self) -> str:
        def shown(names: Sequence[str]) -> str:
            return ", ".join(names) or "none"

        return "\n".join([
            f"{self.repo_id}: history squashed, {len(self.deleted)} stale large files deleted ({shown(self.deleted)}).",
            f"Still listed: {shown(self.remaining)}.",
            f"Other refs: branches {shown(self.branches)}; tags {shown(self.tags)}; "
            f"pull requests {shown(self.pull_requests)}.",
            "This is not erasure: small files of old commits stay reachable by commit, and forks, caches, mirrors and "
            "downloads are out of reach.",
        ])  # fmt: skip


def purge_history(repo_id: str, *, branch: str = "main", token: str | bool | None = None) -> PurgeReport:
    """Squash a branch, and delete for good every large file of the repository that its head does not have.

    Cannot be undone. What other branches and tags have of large files is deleted too, and their history rewritten.
    Squashing alone leaves the old weights reachable by their commit. The safe way is a new repository.

    Returns:
        What was deleted and what remains, for a person to read.

    Raises:
        PushError: The Hub refused or could not be reached; the same call goes on from there.
    """
    call = f"purge_history({repo_id!r}, branch={branch!r})"
    with one_failure(f"the history of {repo_id} was not purged to the end", call, token):
        api = HfApi(token=token)
        api.super_squash_history(repo_id, branch=branch)
        info = api.model_info(repo_id, revision=branch, files_metadata=True)
        head = {f.lfs.sha256 for f in info.siblings or [] if f.lfs is not None}
        stale = [f for f in api.list_lfs_files(repo_id) if f.file_oid not in head]
        api.permanently_delete_lfs_files(repo_id, stale, rewrite_history=True)
        refs = api.list_repo_refs(repo_id, include_pull_requests=True)
        left = [f for f in api.list_lfs_files(repo_id) if f.file_oid not in head]
    return PurgeReport(
        repo_id,
        deleted=tuple(f.filename for f in stale),
        remaining=tuple(f.filename for f in left),
        branches=tuple(ref.name for ref in refs.branches if ref.name != branch),
        tags=tuple(ref.name for ref in refs.tags),
        pull_requests=tuple(ref.ref for ref in [*refs.converts, *(refs.pull_requests or [])]),
    )
