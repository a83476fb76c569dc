"""Statistics that one request passes on to the next."""

from dataclasses import replace
from typing import TypedDict

from hf_unlearn.statistics.retain_statistics import RetainStatistics

CARRIED = "carried_from"

NEGATIVE = 0.005
"""Warn if more than this share of a Gram matrix's energy is negative: the carried statistics are out of date."""


class StatisticsIdentity(TypedDict):
    """Which statistics: number of rows, fingerprint of the rows, fingerprint of the weights."""

    rows: int
    data: str
    weights: str


def carry(statistics: RetainStatistics, weights: str) -> RetainStatistics:
    """Return the same sums as statistics of the unlearned weights, which they approximate.

    How well is described in `hf_unlearn.deletion.series`. The fingerprints of the weights that they were passed on from
    are in `settings["carried_from"]`, oldest first.

    Args:
        statistics: Retain statistics of the completed request.
        weights: Fingerprint of the unlearned weights.
    """
    origins = [*statistics.settings.get(CARRIED, []), statistics.weights]
    return replace(statistics, weights=weights, settings={**statistics.settings, CARRIED: origins})


def negative_share(statistics: RetainStatistics) -> float:
    """Return the largest share of negative energy of any Gram matrix.

    Negative energy appears when statistics that were collected on other weights are subtracted.
    """
    return max((statistics.gram_eigen(layer).negative_share for layer in statistics.layers), default=0.0)


def identify_statistics(statistics: RetainStatistics) -> StatisticsIdentity:
    """Return what identifies statistics in the ledger."""
    return {"rows": statistics.rows, "data": statistics.data, "weights": statistics.weights}
