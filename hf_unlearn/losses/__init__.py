"""Unlearning losses: one small callable each, one registry."""

from hf_unlearn.losses import (  # noqa: F401  (each registers its losses)
    gradient_ascent,
    label_removal,
    pdu,
    pgu,
    preference,
    rmu,
    weighted,
)
from hf_unlearn.losses.base import LOSSES, UnlearningLoss, build_loss, register_loss

__all__ = ["LOSSES", "UnlearningLoss", "build_loss", "register_loss"]
