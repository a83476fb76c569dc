"""What may leave the machine, and the one way it does."""

from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi

PUBLISHED = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json",
    "tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "chat_template*", "*processor_config.json",
    "README.md", "unlearning_report.json", "plots/*.png",
)  # fmt: skip


def upload(folder: str | Path, repo_id: str, **options: Any) -> CommitInfo:
    """Upload the publishable files of `folder`: never logs, data, optimizer states or training arguments."""
    return HfApi().upload_folder(repo_id=repo_id, folder_path=folder, allow_patterns=list(PUBLISHED), **options)
