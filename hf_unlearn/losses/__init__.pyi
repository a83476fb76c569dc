from .base import LOSSES as LOSSES
from .base import LossKind as LossKind
from .base import UnlearningLoss as UnlearningLoss
from .base import build_loss as build_loss
from .base import register_loss as register_loss
