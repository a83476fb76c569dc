"""`PushOptions`: how something is published on the Hub."""

from dataclasses import dataclass


@dataclass(frozen=True)
class PushOptions:
    """How a folder is published on the Hub.

    Attributes:
        private: Visibility of a repository that the push creates; if True, an existing public one is refused.
        token: Write token; default: `HF_TOKEN` or the token of `hf auth login`.
        revision: Branch, created if it does not exist; default: `main`.
        commit_message: First line of the commit; default: one that says what is published.
        update: Also push into a repository that has other files. Its older weights leave the branch but stay reachable
            by commit; see `purge_history`.
    """

    private: bool | None = None
    token: str | bool | None = None
    revision: str | None = None
    commit_message: str | None = None
    update: bool = False
