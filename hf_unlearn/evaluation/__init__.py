"""Evaluating a model: measurements of rows, metrics computed from them, attacks, and the report."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
