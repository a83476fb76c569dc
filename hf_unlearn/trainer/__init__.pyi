from .config import UnlearningConfig as UnlearningConfig
from .presets import PRESETS as PRESETS
from .trainer import UnlearningTrainer as UnlearningTrainer
