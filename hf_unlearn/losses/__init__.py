"""Unlearning losses: one small callable each, one registry."""

from hf_unlearn.losses import classic, flat, pgu, preference, rmu, targets, weighted  # noqa: F401  (registered there)
from hf_unlearn.losses.base import LOSSES, UnlearningLoss, build_loss, register_loss

__all__ = ["LOSSES", "UnlearningLoss", "build_loss", "register_loss"]
