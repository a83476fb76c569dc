from .base import UnlearningLoss as UnlearningLoss
from .build import build_loss as build_loss
from .registry import LOSSES as LOSSES
from .registry import LossKind as LossKind
from .registry import register_loss as register_loss
