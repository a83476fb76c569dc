"""The table that `RetainStatistics.summary` prints."""

from typing import TYPE_CHECKING

from hf_unlearn.statistics.eigen import rank_for_energy
from hf_unlearn.statistics.sketch import exact_shape

if TYPE_CHECKING:
    from hf_unlearn.statistics.retain_statistics import RetainStatistics


def summary_table(statistics: "RetainStatistics") -> str:
    """Return one line about the statistics, a header, and one line per Gram.

    The columns are the number of features I and of positions N, the ranks at 90% and 99% energy and the full rank (of
    blocks the largest), the share of the energy that a sketch misses, and the share of negative energy. A rank with a
    `>` is above what the sketch holds.
    """
    lines = [
        _overview(statistics),
        f"{'Gram (layers that share it)':<52} {'I':>6} {'N':>9} {'rank90':>7} {'rank99':>7} {'rank':>6} "
        f"{'missed':>8} {'negative':>9}",
    ]
    return "\n".join([*lines, *(_gram_line(statistics, name) for name in statistics.gram_sums)])


def _overview(statistics: "RetainStatistics") -> str:
    line = (
        f"{statistics.rows} rows, {len(statistics.layers)} layers, {len(statistics.gram_sums)} Grams, "
        f"{len(statistics.fisher_sums)} Fishers, weights {statistics.weights[:12]}, data {statistics.data[:12]}"
    )
    if "tolerance" not in statistics.settings:
        return line
    available = f" of {statistics.sampled_from}" if statistics.sampled_from is not None else ", the last"
    return f"{line}; stopped at row {statistics.rows}{available}, change {statistics.settings['change']}"


def _gram_line(statistics: "RetainStatistics", name: str) -> str:
    sums, eigen = statistics.gram_sums[name], statistics.gram_eigen(name)
    blocks = eigen.blocks()
    needed = [max(rank_for_energy(block.spectrum_I, energy) for block in blocks) for energy in (0.9, 0.99, 1.0)]
    held = eigen.values_I.shape[-1]
    rank90, rank99, rank = [str(rank) if rank <= held else f">{held}" for rank in needed]
    missed = max(block.missed_share for block in blocks)
    sharing = sum(layer.inputs == name for layer in statistics.layers.values())
    label = name if sharing == 1 else f"{name} (+{sharing - 1})"
    label += f" ({len(sums)} blocks)" if sums.ndim == 3 else ""
    return (
        f"{label:<52} {exact_shape(sums.shape)[-1]:>6} {statistics.positions[name]:>9} {rank90:>7} {rank99:>7} "
        f"{rank:>6} {missed:>8.1e} {eigen.negative_share:>9.1e}"
    )
