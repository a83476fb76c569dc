from .hub import PurgeReport as PurgeReport
from .hub import purge_history as purge_history
from .registry import Registry as Registry
from .storage import Storage as Storage
