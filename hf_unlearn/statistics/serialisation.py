"""The folder of saved statistics: `statistics.safetensors` with the sums, `statistics.json` with everything else.

The JSON file has the format version and the checksum of the tensor file. Nothing is pickled.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_unlearn.core.files import replace_folder, sha256_of, write_json
from hf_unlearn.errors import StatisticsError
from hf_unlearn.statistics.sketch import is_sketch

FORMAT_VERSION = 2
"""Version 1 has no sketches; it is still written where there are none, so that older packages can read it."""
TENSORS, METADATA = "statistics.safetensors", "statistics.json"


def write_statistics(
    folder: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], overwrite: bool
) -> None:
    """Write the two files to `folder`, atomically.

    Raises:
        OutputError: `folder` is not empty and `overwrite` is false.
    """
    with replace_folder(folder, overwrite) as new:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, new / TENSORS)
        version = FORMAT_VERSION if any(is_sketch(tensor.shape) for tensor in tensors.values()) else 1
        head = {"format_version": version, "sha256": sha256_of(new / TENSORS)}
        write_json(new / METADATA, head | dict(metadata))


def read_statistics(path: Path, device: str | torch.device = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the metadata of a folder; on the CPU the tensors are mapped from the file.

    Raises:
        StatisticsError: Missing, truncated or altered files, or a newer format.
    """
    metadata = _read_metadata(path)
    if sha256_of(path / TENSORS) != metadata.pop("sha256"):
        raise StatisticsError(f"{path / TENSORS} does not match its checksum (truncated or altered); collect again")
    try:
        return load_file(path / TENSORS, device=str(device)), metadata
    except SafetensorError as error:
        raise StatisticsError(f"{path / TENSORS} cannot be read ({error}); collect again") from error


def _read_metadata(path: Path) -> dict[str, Any]:
    for name in (METADATA, TENSORS):
        if not (path / name).is_file():
            raise StatisticsError(f"{path} is not a statistics folder: {name} is missing")
    try:
        metadata = json.loads((path / METADATA).read_text(encoding="utf-8"))
        version, _ = int(metadata.pop("format_version")), metadata["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise StatisticsError(f"{path / METADATA} cannot be read ({error!r}); collect again") from error
    if version > FORMAT_VERSION:
        raise StatisticsError(
            f"{path} has format {version}, newer than this version's {FORMAT_VERSION}; update hf-unlearn"
        )
    return metadata


def local_folder(folder: str | os.PathLike[str], revision: str | None, token: str | bool | None) -> Path:
    """Return a local folder as it is, or download the statistics of a Hub repository `user/repo`.

    Raises:
        StatisticsError: Neither a local folder nor a repository id, or the download failed.
    """
    path = Path(folder)
    if path.exists():
        return path
    if len(path.parts) != 2 or path.is_absolute():
        raise StatisticsError(f"{folder} is neither a local folder nor a Hub id of the form user/repo")
    from huggingface_hub import snapshot_download

    from hf_unlearn.core.hub import scrub

    try:
        files = [TENSORS, METADATA]
        return Path(snapshot_download(str(folder), revision=revision, token=token, allow_patterns=files))
    except Exception as error:  # the client's exceptions have no base class in common
        reason = scrub(f"{type(error).__name__}: {error}", token)
        raise StatisticsError(f"cannot download statistics {str(folder)!r} from the Hub ({reason})") from None
