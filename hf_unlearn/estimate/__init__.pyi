from .memory import Memory as Memory
from .memory import Settings as Settings
from .tracing import trace as trace
