"""Statistics that one request passes on to the next."""

from dataclasses import replace
from typing import Any

from hf_unlearn.statistics.retain_statistics import RetainStatistics

CARRIED = "carried_from"

NEGATIVE = 0.005
"""Warn when a larger share of a Gram's energy than this has become negative: the carried statistics are out of date."""


def carry(statistics: RetainStatistics, weights: str) -> RetainStatistics:
    """The same sums as statistics of the unlearned weights, which they approximate (see the module).

    The fingerprints of the weights that they were passed on from stay in `settings["carried_from"]`, oldest first.
    """
    origins = [*statistics.settings.get(CARRIED, []), statistics.weights]
    return replace(statistics, weights=weights, settings={**statistics.settings, CARRIED: origins})


def negative_share(statistics: RetainStatistics) -> float:
    """Largest share of negative energy of any Gram: what subtraction on other weights made indefinite."""
    return max((statistics.gram_eigen(layer).negative_share for layer in statistics.layers), default=0.0)


def about_statistics(statistics: RetainStatistics) -> dict[str, Any]:
    """What names statistics: how many rows, which, and on which weights."""
    return {"rows": statistics.rows, "data": statistics.data, "weights": statistics.weights}
