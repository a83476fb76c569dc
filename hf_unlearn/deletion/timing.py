"""Seconds that the phases of a request take."""

import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager


@contextmanager
def timed(timings: MutableMapping[str, float], phase: str) -> Iterator[None]:
    """Record the seconds that the body takes in `timings[phase]`; an exception in the body records nothing."""
    start = time.perf_counter()
    yield
    timings[phase] = round(time.perf_counter() - start, 3)
