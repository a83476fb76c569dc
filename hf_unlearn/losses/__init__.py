"""Unlearning losses: one small callable each, one registry."""

from hf_unlearn.losses import classic, npo, pgu, targets  # noqa: F401  (each module registers its losses)
from hf_unlearn.losses.base import LOSSES, UnlearningLoss, build_loss, register_loss

__all__ = ["LOSSES", "UnlearningLoss", "build_loss", "register_loss"]
