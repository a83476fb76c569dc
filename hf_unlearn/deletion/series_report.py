"""The part of the report that a series adds, and the warnings about what runs out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any

from hf_unlearn.deletion.carried_statistics import CARRIED, NEGATIVE, negative_share
from hf_unlearn.deletion.room import room_left, running_out
from hf_unlearn.evaluation.report import UnlearningReport

if TYPE_CHECKING:
    from hf_unlearn.deletion.ledger_entries import Entry
    from hf_unlearn.deletion.series import BegunRequest
    from hf_unlearn.deletion.series_entry import RequestOutcome

_WAY_OUT = "collect statistics again on the last model, or retrain"


def add_series(report: UnlearningReport, begun: BegunRequest, outcome: RequestOutcome) -> None:
    """Add to `report.request` the number and the commitment, fill `report.series`, and issue its warnings.

    `report.series` has:

    - `requests`: number of requests with this one.
    - `mark`: see `RequestSeries.mark`.
    - `statistics_carried_from`: fingerprints of the weights that the statistics were passed on from.
    - `negative_share`: see `hf_unlearn.deletion.series`.
    - `room`: share of the forget rows' input energy that the constraint lets through, `tr(R G R) / tr(G)` with G their
      Gram matrix and R the right factor. This is what a gradient on these rows has left. None if the statistics of the
      forget rows were not collected.
    - `drift_used`: the predicted relative drifts of all requests, summed layer by layer. By the triangle inequality the
      sum bounds the drift from the weights before the first request, to the extent that the statistics of the requests
      agree. `budget` is `max_retain_drift` over all requests; the report's settings have what was left for this one.
    - `untested`: earlier requests whose rows could not be tested, and why.
    - `warnings`: one line each.
    """
    series, retain = begun.series, outcome.retain
    report.request |= {"number": series.number, "commitment": begun.commitment.whole}
    is_protected = retain is not None and outcome.constraint is not None
    report.series = {
        "requests": series.number,
        "mark": series.mark(str(report.settings.get("forget_metric"))),
        "statistics_carried_from": [] if retain is None else list(retain.settings.get(CARRIED, [])),
        "negative_share": negative_share(retain) if retain is not None and is_protected else None,
        "room": _room(outcome),
        "drift_used": _drift_used(report, begun),
        "untested": {str(number): why for number, why in begun.untested.items()},
    }
    report.series["warnings"] = list(_warnings(report, begun))
    for line in report.series["warnings"]:
        warnings.warn(line, stacklevel=3)


def _room(outcome: RequestOutcome) -> dict[str, Any] | None:
    if outcome.forget is None or outcome.retain is None or outcome.constraint is None:
        return None
    by_layer = room_left(outcome.forget, outcome.retain, outcome.constraint)
    if not by_layer:
        return None
    return {"mean": fmean(by_layer.values()), "least": min(by_layer.values()), "by_layer": by_layer}


def _drift_used(report: UnlearningReport, begun: BegunRequest) -> dict[str, Any]:
    by_layer = begun.series.drift_by_layer
    for layer, drift in (report.drift.get("by_layer") or {}).items():
        by_layer[layer] = by_layer.get(layer, 0.0) + drift
    left = report.settings.get("max_retain_drift")
    budget = None if left is None else begun.series.drift_used + left
    return {"relative": root_mean_square(by_layer.values()), "budget": budget, "by_layer": by_layer}


def _warnings(report: UnlearningReport, begun: BegunRequest) -> Iterator[str]:
    """Yield one line for each thing that will have run out at the next request, or has already."""
    series, room = begun.series, report.series["room"]
    rooms = [record["room"] for record in series.records if record["room"] is not None]
    if room is not None and running_out([*rooms, room["mean"]]):
        yield (
            f"the room is running out: the constraint leaves {room['mean']:.2%} of the forget rows' input energy free, "
            f"down from {rooms[0]:.2%} at the first request; {_WAY_OUT}, or protect less"
        )
    used, budget = report.series["drift_used"]["relative"], report.series["drift_used"]["budget"]
    if budget is not None and used * (1 + 1 / series.number) > budget:
        yield f"the drift budget is running out: {series.number} requests used {used:.4f} of {budget:.4f}; {_WAY_OUT}"
    share = report.series["negative_share"]
    if share is not None and share > NEGATIVE and report.series["statistics_carried_from"]:
        yield f"the carried statistics are out of date: {share:.1%} of a Gram matrix's energy is negative; {_WAY_OUT}"
    yield from came_back(report, series.completed)
    if begun.untested:
        numbers = ", ".join(map(str, begun.untested))
        yield (
            f"rows of earlier requests ({numbers}) are not available: whether they are still forgotten was not tested"
        )


def came_back(report: UnlearningReport, completed: Sequence[Entry]) -> Iterator[str]:
    """Yield a line for each earlier forget set that the model knows better again, beyond the 95% intervals."""
    for entry in completed:
        number = entry.content["request"]
        for name in ("accuracy", "answer_probability"):
            now = report.get(name, f"forgotten_{number}")
            high = _high_after_request(entry.content["metrics"], name)
            if now is not None and now.low is not None and high is not None and now.low > high:
                yield (
                    f"the rows of request {number} came back: {name} {now.value:.3f} [{now.low:.3f}, {now.high:.3f}], "
                    f"but at most {high:.3f} after their own request; run with forget_again (--forget_again True)"
                )
                break


def _high_after_request(metrics: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Return the upper bound of the forget rows' metric right after their own request."""
    for metric in metrics:
        if (metric["name"], metric["split"], metric["model"]) == (name, "forget", "unlearned"):
            return metric["high"]
    return None


def root_mean_square(values: Iterable[float]) -> float:
    """Return the root mean square; 0 for no values."""
    squares = [value**2 for value in values]
    return math.sqrt(fmean(squares)) if squares else 0.0
