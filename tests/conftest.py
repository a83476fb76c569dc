"""Fixtures that several test files share."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from helpers.hub_client import Client, start
from helpers.hub_server import Hub, loopback_hub
from helpers.tiny import CLASSES, tiny_bert, tiny_vit
from PIL import Image
from torch import Tensor

from hf_unlearn.losses import LOSSES
from hf_unlearn.losses.registry import LossKind
from hf_unlearn.models.forward import Predictions

if not torch.cuda.is_available():  # DeepSpeed prints a line on standard output when it has to look for an accelerator
    os.environ.setdefault("DS_ACCELERATOR", "cpu")


@pytest.fixture
def nan_after_first() -> Iterator[str]:
    """A loss that is the likelihood at its first call and NaN from then on."""
    calls: list[int] = []

    def term(predictions: Predictions, original: None) -> Tensor:
        calls.append(1)
        return -predictions.nll_L if len(calls) == 1 else predictions.nll_L * math.nan

    LOSSES.add("nan_after_first", LossKind(term))
    yield "nan_after_first"
    LOSSES.remove("nan_after_first")


@pytest.fixture
def double() -> Iterator[None]:
    """New tensors are float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def hub_and_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Hub, Client]]:
    """A loopback Hub, and a process that takes it for the Hub and sends large files by Git LFS."""
    with loopback_hub() as running:
        process = start(tmp_path_factory.mktemp("client"), running.url, HF_HUB_DISABLE_XET="1")
        yield running, process
        process.kill()


@pytest.fixture
def hub(hub_and_client: tuple[Hub, Client]) -> Hub:
    """The loopback Hub, empty."""
    hub_and_client[0].reset()
    return hub_and_client[0]


@pytest.fixture
def client(hub_and_client: tuple[Hub, Client]) -> Client:
    return hub_and_client[1]


@pytest.fixture
def classified(tmp_path: Path) -> dict[str, str]:
    """Folders of a tiny text and a tiny image classifier, each with its processor and data set."""
    from helpers.pictures import processor as picture_processor
    from helpers.texts import QUESTION, tokenizer

    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (16, 8, 8), dtype=np.uint8)
    pictures = [{"image": Image.fromarray(pixels[i]), "label": i % CLASSES} for i in range(16)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    texts = [{"sentence": QUESTION + " ." * i, "label": i % CLASSES} for i in range(1, 17)]
    for name, model, processor, rows in (
        ("image", tiny_vit(), picture_processor(), datasets.Dataset.from_list(pictures, features=features)),
        ("text", tiny_bert(), tokenizer(), datasets.Dataset.from_list(texts)),
    ):
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        (tmp_path / f"{name}-data").mkdir()
        rows.to_parquet(tmp_path / f"{name}-data" / "full.parquet")
    return {"image": str(tmp_path / "image"), "text": str(tmp_path / "text")}
