"""Fixtures that several test files share."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
from hub_client import Client, start
from hub_server import Hub, loopback_hub
from torch import Tensor

from hf_unlearn.losses import LOSSES
from hf_unlearn.losses.base import LossKind
from hf_unlearn.predictions import Predictions


@pytest.fixture
def nan_after_first() -> Iterator[str]:
    """A loss that is the likelihood at its first call and NaN from then on."""
    calls: list[int] = []

    def term(predictions: Predictions, original: None) -> Tensor:
        calls.append(1)
        return -predictions.nll_L if len(calls) == 1 else predictions.nll_L * math.nan

    LOSSES["nan_after_first"] = LossKind(term)
    yield "nan_after_first"
    del LOSSES["nan_after_first"]


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
