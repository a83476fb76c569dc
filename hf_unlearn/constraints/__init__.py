"""Constraints: linear maps from a proposed step of a weight to an allowed one."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
