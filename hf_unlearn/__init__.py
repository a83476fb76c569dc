"""Machine unlearning by gradient projection for Hugging Face Transformers.

Names are imported on first use, so that `import hf_unlearn` loads neither torch nor transformers. `__init__.pyi` lists
them, for type checkers and for `lazy_loader`.
"""

import lazy_loader

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
