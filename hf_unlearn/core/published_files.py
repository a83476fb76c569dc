"""Which files of a folder may leave the machine: only names on a list, and no file that holds an access token."""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import get_token

from hf_unlearn.errors import SettingsError

WEIGHTS = (
    "model.safetensors",
    "model-[0-9]*-of-[0-9]*.safetensors",
    "model.safetensors.index.json",
    "adapter_model.safetensors",
    "adapter_model-[0-9]*-of-[0-9]*.safetensors",
    "adapter_model.safetensors.index.json",
)
VOCABULARIES = (
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "vocab-src.json",
    "vocab-tgt.json",
    "target_vocab.json",
    "merges.txt",
    "bpe.codes",
    "dict.txt",
    "entity_vocab.json",
    "emoji.json",
    "byte_maps.json",
    "word_shape.json",
    "normalizer.json",
    "word_pronunciation.json",
    "prophetnet.tokenizer",
    "spiece.model",
    "spm.model",
    "spm_char.model",
    "source.spm",
    "target.spm",
    "sentencepiece.model",
    "sentencepiece.bpe.model",
)
"""File names that the tokenizers of transformers use."""
PUBLISHED = (
    *WEIGHTS,
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    *VOCABULARIES,
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "README.md",
    "unlearning_report.json",
    "plots/*.png",
)
"""Patterns of the files of a model that are published, folder by folder: `*` does not match across a slash."""
STATISTICS = ("statistics.safetensors", "statistics.json", "README.md")
"""The files of retain statistics, which are published only on request."""
_CODE_OF_THE_MODEL = (
    "configuration_*.py",
    "modeling_*.py",
    "tokenization_*.py",
    "processing_*.py",
    "image_processing_*.py",
)
TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
"""What an access token of the Hub looks like."""


def publishable(folder: str | Path, patterns: Sequence[str] = PUBLISHED) -> list[str]:
    """Return the files of `folder` that may be published, as sorted relative paths.

    Python modules of the model are included only if its configuration refers to them (`auto_map`).

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name in ("model.safetensors", "config.json", "optimizer.pt", "forget_rows.json"):
    ...     _ = (folder / name).write_text("{}")
    >>> publishable(folder)
    ['config.json', 'model.safetensors']
    """
    root = Path(folder)
    if patterns is PUBLISHED and _refers_to_code(root):
        patterns = (*patterns, *_CODE_OF_THE_MODEL)
    names = (path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return sorted(name for name in names if any(matches(name, pattern) for pattern in patterns))


def matches(path: str, pattern: str) -> bool:
    """Return whether a relative path matches a pattern, folder by folder.

    >>> matches("plots/rows.png", "plots/*.png"), matches("plots/old/rows.png", "plots/*.png")
    (True, False)
    """
    names, patterns = path.split("/"), pattern.split("/")
    return len(names) == len(patterns) and all(map(fnmatchcase, names, patterns))


def refuse_tokens(folder: Path, files: Iterable[str], token: str | bool | None) -> None:
    """Raise `SettingsError` if a text file holds the token in use or what looks like another token."""
    known = token if isinstance(token, str) else get_token()
    for name in files:
        if name.endswith((".safetensors", ".png")):
            continue
        content = (folder / name).read_text(encoding="utf-8", errors="replace")
        if (known and known in content) or TOKEN.search(content):
            raise SettingsError(f"{folder / name} holds an access token; remove it, and revoke it if it was shown")


def _refers_to_code(folder: Path) -> bool:
    names = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
    paths = (folder / name for name in names if (folder / name).is_file())
    return any('"auto_map"' in path.read_text(encoding="utf-8") for path in paths)
