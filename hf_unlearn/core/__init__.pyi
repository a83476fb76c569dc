from .history import PurgeReport as PurgeReport
from .history import purge_history as purge_history
from .registry import Registry as Registry
from .registry import TypeRegistry as TypeRegistry
from .storage import Storage as Storage
