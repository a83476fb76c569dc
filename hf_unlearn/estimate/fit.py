"""Settings that fit in the memory of a device."""

from collections.abc import Iterator
from dataclasses import replace

from hf_unlearn.estimate.memory import Memory, estimate_memory
from hf_unlearn.estimate.sizes import EstimateSettings, Trace, entries, sum_sizes, sums_bytes

SHARE = 0.9
"""Share of a device's memory that tensors may take. The rest is for what the allocator cannot hand out and what the
libraries keep."""


def candidates(settings: EstimateSettings, processes: int) -> Iterator[EstimateSettings]:
    """Yield settings for P processes, the fastest first."""
    shardings = [("none", False)] + [("fsdp2", False), ("fsdp2", True)] * (processes > 1)
    for sharding, before in shardings:
        for place in ("device", *(("shards",) if processes > 1 else ()), "cpu"):
            yield replace(settings, processes=processes, sharding=sharding, place=place, sharded_before=before)


def fastest_fit(
    trace: Trace, settings: EstimateSettings, processes: int, device_bytes: int
) -> tuple[EstimateSettings, Memory] | None:
    """Return the fastest settings for P processes whose peaks fit, and their memory; None if no settings fit.

    A peak fits if it is at most `SHARE * device_bytes`.
    """
    room = int(SHARE * device_bytes)
    fisher = settings.has_fishers
    widest = max((8 * entries(n, trace.sketching) for n in sum_sizes(trace, fisher)), default=0)
    for candidate in candidates(settings, processes):
        memory = estimate_memory(trace, candidate)
        if memory.peak > room and candidate.place == "cpu":  # only unfinished sums can still be made smaller
            base = memory.phases["collect"] - sums_bytes(trace, fisher)
            limit = (room - base) // 10**8 * 10**8
            if limit >= widest:
                candidate = replace(candidate, max_memory=int(limit))
                memory = estimate_memory(trace, candidate)
        if memory.peak <= room:
            return candidate, memory
    return None
