"""Publishing retain statistics on the Hub, with a short card."""

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, ModelCardData

from hf_unlearn.core.hub import push_folder
from hf_unlearn.core.published_files import STATISTICS, publishable
from hf_unlearn.core.push_options import PushOptions


def push_statistics(folder: str | os.PathLike, repo_id: str, options: PushOptions) -> CommitInfo:
    """Publish retain statistics that were saved to `folder`, with a short card; see `hub.push_folder`."""
    root = Path(folder)
    if not (root / "README.md").is_file():
        content = json.loads((root / "statistics.json").read_text(encoding="utf-8"))
        (root / "README.md").write_text(_statistics_card(content), encoding="utf-8")
    options = replace(options, commit_message=options.commit_message or "Retain statistics")
    return push_folder(root, repo_id, publishable(root, STATISTICS), options)


def _statistics_card(content: Mapping[str, Any]) -> str:
    data = ModelCardData(library_name="hf_unlearn", tags=["machine-unlearning", "hf_unlearn", "retain-statistics"])
    kind = "Gram and Fisher matrices" if content["labels"] else "Gram matrices"
    return f"""---
{data.to_yaml()}
---

# Retain statistics

{kind} of the inputs of {len(content["layers"])} linear layers, summed over {content["rows"]} rows, for machine
unlearning by gradient projection with `hf_unlearn`: `RetainStatistics.from_pretrained("<this repository>")`.

| | |
|---|---|
| fingerprint of the weights | `{content["weights"]}` |
| fingerprint of the data | `{content["data"]}` |

They belong to exactly these weights. No row is in them, but second moments are made from the rows: of few rows, or of
one that stands out, they can tell something.
"""
