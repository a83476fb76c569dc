"""Fixtures that several test files share."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
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
