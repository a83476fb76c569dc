"""Memory and time of a deletion request, estimated from its configuration before it runs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
