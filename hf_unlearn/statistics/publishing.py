"""Publishing retain statistics on the Hub, with a short card."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitInfo, ModelCardData

from hf_unlearn.core.hub import push_folder
from hf_unlearn.core.processes import is_main
from hf_unlearn.core.published_files import STATISTICS, publishable
from hf_unlearn.core.push_options import PushOptions
from hf_unlearn.statistics.serialisation import METADATA

if TYPE_CHECKING:
    from hf_unlearn.statistics.retain_statistics import RetainStatistics


def push_statistics(folder: str | os.PathLike[str], repo_id: str, options: PushOptions) -> CommitInfo:
    """Publish retain statistics that were saved to `folder`, with a short card.

    Args:
        folder: A folder of `RetainStatistics.save_pretrained`.
        repo_id: `user/repo` on the Hub.
        options: Visibility, token, branch, commit message, and whether a repository with other files may be updated.

    Raises:
        PushError, SettingsError: As `core.hub.push_folder`.
    """
    root = Path(folder)
    if not (root / "README.md").is_file():
        metadata = json.loads((root / METADATA).read_text(encoding="utf-8"))
        (root / "README.md").write_text(_statistics_card(metadata), encoding="utf-8")
    options = replace(options, commit_message=options.commit_message or "Retain statistics")
    return push_folder(root, repo_id, publishable(root, STATISTICS), options)


def save_and_push(statistics: "RetainStatistics", repo_id: str, options: PushOptions) -> CommitInfo | None:
    """Save statistics to a temporary folder and publish it; see `RetainStatistics.push_to_hub`."""
    scratch = Path(tempfile.mkdtemp(prefix="statistics-"))
    folder = statistics.save_pretrained(scratch / repo_id.rpartition("/")[2])
    if not is_main():
        scratch.rmdir()
        return None
    commit = push_statistics(folder, repo_id, options)
    shutil.rmtree(scratch)  # only after success, so that a failed push can be repeated
    return commit


def _statistics_card(metadata: Mapping[str, Any]) -> str:
    data = ModelCardData(library_name="hf_unlearn", tags=["machine-unlearning", "hf_unlearn", "retain-statistics"])
    matrices = "Gram and Fisher matrices" if metadata["labels"] else "Gram matrices"
    return f"""---
{data.to_yaml()}
---

# Retain statistics

{matrices} of the inputs of {len(metadata["layers"])} linear layers, summed over {metadata["rows"]} rows, for machine
unlearning by gradient projection with `hf_unlearn`: `RetainStatistics.from_pretrained("<this repository>")`.

| | |
|---|---|
| fingerprint of the weights | `{metadata["weights"]}` |
| fingerprint of the data | `{metadata["data"]}` |

They belong to exactly these weights. They contain no rows, but second moments are computed from the rows: with few
rows, or with one that stands out, they can reveal something about them.
"""
