"""What a command sets up before it works: the other processes, and the output of the libraries."""

from collections.abc import Iterator
from contextlib import contextmanager


def join_processes() -> None:
    """Join the other processes of a distributed run, for commands without training arguments, which do so."""
    from accelerate import PartialState

    PartialState()


def hush(bars: bool = True) -> None:
    """Silence the libraries except for errors, whose messages would otherwise bury the table.

    Args:
        bars: Whether to keep the progress bars of steps that take minutes.
    """
    import warnings

    import datasets
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not bars:
        logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", message=".*pin_memory.*")


@contextmanager
def peft_hidden() -> Iterator[None]:
    """Make transformers import its training arguments without peft, in a process that only prints a parser's help.

    `transformers.trainer_utils` imports peft for two `isinstance` checks. peft imports transformers' modeling code,
    torch._dynamo and, if installed, bitsandbytes: two thirds of the time of `hf-unlearn run --help`. A process that
    trains afterwards must not use this, because those checks would never see an adapter.
    """
    from unittest.mock import patch

    import transformers.utils

    with patch.object(transformers.utils, "is_peft_available", return_value=False):
        yield
