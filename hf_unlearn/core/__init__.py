"""Basics that every room uses: files, processes, sharding, storage, registries, settings, text, and the Hub client."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
