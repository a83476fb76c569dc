from .config import UnlearningConfig as UnlearningConfig
from .outcome import UnlearningOutcome as UnlearningOutcome
from .presets import PRESETS as PRESETS
from .trainer import UnlearningTrainer as UnlearningTrainer
