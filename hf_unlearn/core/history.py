"""Removing old weights from the history of a Hub repository."""

from collections.abc import Sequence
from dataclasses import dataclass

from huggingface_hub import HfApi

from hf_unlearn.core.hub import one_failure


@dataclass(frozen=True)
class PurgeReport:
    """What `purge_history` removed, and what it could not remove.

    Attributes:
        repo_id: The repository.
        deleted: Names of the large files whose content was deleted.
        remaining: Names of large files that are still listed but not in the branch's head.
        branches, tags: Other refs by name.
        pull_requests: Refs of pull requests; the Hub has no interface to delete them.
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

        return (
            f"{self.repo_id}: history squashed, {len(self.deleted)} stale large files deleted "
            f"({shown(self.deleted)}).\n"
            f"Still listed: {shown(self.remaining)}.\n"
            f"Other refs: branches {shown(self.branches)}; tags {shown(self.tags)}; "
            f"pull requests {shown(self.pull_requests)}.\n"
            "This is not erasure: small files of old commits stay reachable by commit, and forks, caches, mirrors and "
            "downloads are out of reach."
        )


def purge_history(repo_id: str, *, branch: str = "main", token: str | bool | None = None) -> PurgeReport:
    """Squash a branch, and delete every large file of the repository that is not in the branch's head.

    This cannot be undone. Large files of other branches and tags are deleted too, and their history is rewritten.
    Squashing alone leaves the old weights reachable by their commit. Pushing to a new repository is the safe way.

    >>> report = PurgeReport("me/model", ("model.safetensors",), (), (), (), ())
    >>> print(str(report).splitlines()[0])
    me/model: history squashed, 1 stale large files deleted (model.safetensors).

    Args:
        repo_id: `user/repo`.
        branch: The branch whose head is kept.
        token: Write token; default: `HF_TOKEN` or the token of `hf auth login`.

    Returns:
        What was deleted and what remains, for a person to read.

    Raises:
        PushError: The Hub refused or could not be reached; the same call continues.
    """
    call = f"purge_history({repo_id!r}, branch={branch!r})"
    with one_failure(f"the history of {repo_id} was not purged completely", call, token):
        api = HfApi(token=token)
        api.super_squash_history(repo_id, branch=branch)
        info = api.model_info(repo_id, revision=branch, files_metadata=True)
        head = {file.lfs.sha256 for file in info.siblings or [] if file.lfs is not None}
        stale = [file for file in api.list_lfs_files(repo_id) if file.file_oid not in head]
        api.permanently_delete_lfs_files(repo_id, stale, rewrite_history=True)
        refs = api.list_repo_refs(repo_id, include_pull_requests=True)
        remaining = [file for file in api.list_lfs_files(repo_id) if file.file_oid not in head]
    return PurgeReport(
        repo_id,
        deleted=tuple(file.filename for file in stale),
        remaining=tuple(file.filename for file in remaining),
        branches=tuple(ref.name for ref in refs.branches if ref.name != branch),
        tags=tuple(ref.name for ref in refs.tags),
        pull_requests=tuple(ref.ref for ref in [*refs.converts, *(refs.pull_requests or [])]),
    )
