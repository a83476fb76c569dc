"""One deletion request after another on the same model: what each starts from, and how much room is left.

The procedure is PGU's (WACV 2024, section 3.3): the retain statistics of one request are the full statistics of the
next. What that means, exactly. Let W_0 be the weights that statistics were collected on, F_j the rows of request j, and
W_j the weights after it. Request k is constrained by

    S_k = G(all rows; W_0) - G(F_1; W_0) - G(F_2; W_1) - ... - G(F_k; W_(k-1)),

for a forget set is collected on the model that there is when it arrives: the original, which knows all that was to be
forgotten, need not be kept. S_k differs from the statistics of the rows left on the present weights in two ways:
1. the sum over j of G(F_j; W_0) - G(F_j; W_(j-1)) stays in it. The rows of F_j were retain rows until request j, and
   their inputs moved no more than the constraint let them. `negative_share` shows the part of this that makes S_k
   indefinite; the rest cannot be seen without rows;
2. the rows left have moved, too, by about the drift that was predicted.
Both vanish with energy 1.0 and full coverage, grow with each request below that, and end when statistics are collected
afresh on the last model (`hf-unlearn collect`, then `--statistics`), which reads the retain rows. Negative energy is
clamped, so that its directions are free to move in: `room` then grows, and the predicted drift, which is made from the
same S_k, does not see what happens there. That is why a share above `NEGATIVE` is warned of (digits, a class at each
request: on one seed 3% at the third, with retain accuracy at 0.97, and 0.76 two requests later; recipes/README.md).
"""

import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import nn

from hf_unlearn.constraints.base import ConstraintLike
from hf_unlearn.constraints.energy import EnergyConstraint
from hf_unlearn.core.files import sha256_of, write_json
from hf_unlearn.core.processes import gather
from hf_unlearn.data.formats import Row
from hf_unlearn.deletion.carried_statistics import CARRIED, NEGATIVE, about_statistics, carry, negative_share
from hf_unlearn.deletion.ledger import Commitment, Entry, Ledger
from hf_unlearn.deletion.room import room_left, running_out
from hf_unlearn.errors import DataError, LedgerError
from hf_unlearn.evaluation.report import REPORT, UnlearningReport, plain
from hf_unlearn.models.fingerprint import weights_fingerprint
from hf_unlearn.statistics.retain_statistics import RetainStatistics
from hf_unlearn.statistics.serialisation import TENSORS

PRIVATE, RECORD, STATISTICS = "_private", "request.json", "statistics"


class RequestSeries:
    """The requests of one ledger and the one to come.

    Beside the ledger, `_private/` has a folder for each request: where its rows are to be found (names of splits, no
    row) and where its model is; the last one's has the statistics to go on with. None of it is to be published.

    Attributes:
        done: The completed requests.
        commitment: Of the request to come, once it has begun.
        untested: Earlier requests whose rows are not at hand any more: number -> why.

    Raises:
        LedgerError: The ledger is damaged, or `_private/` lacks what it says.
    """

    def __init__(self, ledger: Ledger):
        self.ledger, self.done = ledger, ledger.requests()
        self.records = [self._record(entry) for entry in self.done]
        self.commitment: Commitment | None = None
        self.untested: dict[int, str] = {}
        self._where: dict[str, Any] = {}
        self._states: tuple[dict[str, Any], dict[str, Any]] = {}, {}
        self._next: RetainStatistics | None = None

    @property
    def number(self) -> int:
        """Number of the request to come, from 1."""
        return len(self.done) + 1

    @property
    def model_folder(self) -> str | None:
        """Where the last model was written."""
        return self.records[-1]["model"] if self.records else None

    @property
    def drift_used(self) -> float:
        """Root mean square over layers of the summed predicted drifts; see `describe`."""
        return _root_mean_square((self.records[-1]["drift_used"] if self.records else {}).values())

    def mark(self, forget_metric: str) -> float | None:
        """The forget metric on held-out rows before the first request: what forget rows are to come to at each.

        That of the model at hand would fall with every request's damage, and the next one would go after it.
        """
        metric = {"probability": "answer_probability"}.get(forget_metric, forget_metric)
        found = [m["value"] for m in (self.done[0].content["metrics"] if self.done else [])
                 if (m["name"], m["split"], m["model"]) == (metric, "holdout", "original")]  # fmt: skip
        return found[0] if found else None

    def check_model(self, model: nn.Module) -> None:
        """Raise `LedgerError` unless `model` is the last request's, to the bit."""
        if not self.done:
            return
        expected, seen = self.done[-1].content["weights"]["after"], weights_fingerprint(model)
        if seen != expected:
            raise LedgerError(
                f"the model has weights {seen[:12]}, and request {self.number - 1} of {self.ledger.folder} ended with "
                f"{expected[:12]}; go on from that model, or begin another ledger"
            )

    def statistics(self, model: nn.Module) -> RetainStatistics | None:
        """What the last request left, checked against ledger and `model`; None where it had none."""
        if not self.done:
            return None
        kept = self.done[-1].content["statistics"]["after"]
        if kept is None:
            return None
        folder = self._private(self.done[-1]) / STATISTICS
        if not (folder / TENSORS).is_file() or sha256_of(folder / TENSORS) != kept["sha256"]:
            raise LedgerError(
                f"{folder} is missing or is not what the ledger says; collect afresh on the last model "
                "(hf-unlearn collect) and pass --statistics"
            )
        return RetainStatistics.from_pretrained(folder, model=model)

    def earlier(self, load: Callable[[dict[str, Any]], Sequence[Row]]) -> dict[int, Sequence[Row]]:
        """The rows of earlier requests, by number, to be tested again; only those that match their commitments.

        `load` gets what `begin` was told about where they are. Rows that are not there any more, as it should be once
        a request is through with the data, are in `untested` instead.
        """
        found = {}
        for entry, record in zip(self.done, self.records, strict=True):
            number = entry.content["request"]
            try:
                rows = load(record["where"])
            except DataError:
                self.untested[number] = "not at hand"  # the report is published: it says no more
                continue
            if self.ledger.holds(entry, rows):
                found[number] = rows
            else:
                self.untested[number] = "the rows found are not those of the request"
        return found

    def begin(self, rows: Sequence[Row], where: Mapping[str, Any] | None = None) -> None:
        """Commit to the rows to forget.

        Args:
            rows: As users have them, so that `ledger prove` finds them.
            where: Whatever finds them again for `earlier`.

        Raises:
            DataError: A row was in an earlier request: its statistics would be subtracted twice.
            LedgerError: No key, or another than the ledger's.
        """
        for entry in self.done:
            tags = set(entry.content["rows"])
            twice = [index for index, row in enumerate(rows) if self.ledger.tag(entry.content["nonce"], row) in tags]
            if twice:
                raise DataError(
                    f"{len(twice)} forget rows (first: row {twice[0]}) were in request {entry.content['request']} "
                    f"already, completed {entry.time}; leave them out"
                )
        self.commitment = gather(self.ledger.commit(rows))[0]
        self._where = dict(where or {})

    def describe(
        self,
        report: UnlearningReport,
        *,
        weights: tuple[str, str],
        forget: RetainStatistics | None,
        full: RetainStatistics | None,
        retain: RetainStatistics | None,
        constraint: ConstraintLike,
    ) -> None:
        """Put into the report what only the series knows.

        - `mark`: see there.
        - `room`: share of the forget rows' input energy that the constraint lets through, `tr(R G R) / tr(G)` with G
          their Gram and R the right factor; it is what a gradient on them has left. None where the forget rows were not
          collected.
        - `drift_used`: the predicted relative drifts of all requests, added layer by layer. By the triangle inequality
          it bounds the drift from the first request's weights, as far as the requests' statistics agree. `budget` is
          `max_retain_drift` over all requests, of which the report's settings have what was left for this one.
        - `negative_share`: see the module.

        Args:
            report: Of this request, otherwise finished.
            weights: Fingerprints before and after.
            forget: Statistics of the forget rows.
            full: What this request started from.
            retain: What it was constrained by.
            constraint: Its constraint.
        """
        assert self.commitment is not None
        report.request |= {"number": self.number, "commitment": self.commitment.whole}
        used = dict(self.records[-1]["drift_used"]) if self.records else {}
        for layer, drift in (report.drift.get("by_layer") or {}).items():
            used[layer] = used.get(layer, 0.0) + drift
        protected = retain is not None and constraint is not None
        room = room_left(forget, retain, constraint) if forget and retain and protected else {}
        left = report.settings.get("max_retain_drift")
        budget = None if left is None else self.drift_used + left
        report.series = {
            "requests": self.number,
            "mark": self.mark(str(report.settings.get("forget_metric"))),
            "statistics_carried_from": list(retain.settings.get(CARRIED, [])) if retain else [],
            "negative_share": negative_share(retain) if retain and protected else None,
            "room": {"mean": fmean(room.values()), "least": min(room.values()), "by_layer": room} if room else None,
            "drift_used": {"relative": _root_mean_square(used.values()), "budget": budget, "by_layer": used},
            "untested": {str(number): why for number, why in self.untested.items()},
        }
        report.series["warnings"] = self._warnings(report)
        for line in report.series["warnings"]:
            warnings.warn(line, stacklevel=2)
        before = {"weights": weights[0], "statistics": full and about_statistics(full)}
        self._states = before, {"weights": weights[1]}
        self._next = retain and carry(retain, weights[1])

    def _warnings(self, report: UnlearningReport) -> list[str]:
        """What runs out, before it does."""
        found, way_out = [], "collect statistics afresh on the last model, or retrain"
        rooms = [record["room"] for record in self.records if record["room"] is not None]
        if report.series["room"] is not None and running_out([*rooms, report.series["room"]["mean"]]):
            found.append(
                f"the room is running out: the constraint leaves {report.series['room']['mean']:.2%} of the forget "
                f"rows' input energy free, at the first request it was {rooms[0]:.2%}; {way_out}, or protect less"
            )
        used, budget = report.series["drift_used"]["relative"], report.series["drift_used"]["budget"]
        if budget is not None and used * (1 + 1 / self.number) > budget:
            found.append(
                f"the drift budget is running out: {self.number} requests used {used:.4f} of {budget:.4f}; {way_out}"
            )
        aged = report.series["negative_share"]
        if aged is not None and aged > NEGATIVE and report.series["statistics_carried_from"]:
            found.append(
                f"the carried statistics are out of date: {aged:.1%} of a Gram's energy is negative; {way_out}"
            )
        found += self._came_back(report)
        if self.untested:
            numbers = ", ".join(map(str, self.untested))
            found.append(f"rows of earlier requests ({numbers}) are not at hand: whether they stayed forgotten is open")
        return found

    def _came_back(self, report: UnlearningReport) -> Iterator[str]:
        """Earlier forget sets that the model knows better than when they were forgotten, beyond the 95% intervals."""
        for entry in self.done:
            number, then = entry.content["request"], entry.content["metrics"]
            for name in ("accuracy", "answer_probability"):
                now = report.get(name, f"forgotten_{number}")
                high = [m["high"] for m in then if (m["name"], m["split"], m["model"]) == (name, "forget", "unlearned")]
                if now is not None and now.low is not None and high and high[0] is not None and now.low > high[0]:
                    yield (
                        f"the rows of request {number} came back: {name} {now.value:.3f} [{now.low:.3f}, "
                        f"{now.high:.3f}], after their own request at most {high[0]:.3f}; run with forget_again "
                        "(--forget_again True)"
                    )
                    break

    def complete(self, report: UnlearningReport, folder: str | os.PathLike) -> Entry:
        """Keep what the next request needs, then append the entry; it is the entry that makes the request completed.

        Call it in one process, after the output folder is in its place. Killed before the entry is written, the
        series is where it was before the request.
        """
        assert self.commitment is not None
        (before, after), path = self._states, Path(folder).resolve()
        private = self.ledger.folder / PRIVATE / _name(self.number, self.commitment.nonce)
        shutil.rmtree(private, ignore_errors=True)
        private.mkdir(parents=True)
        private.parent.chmod(0o700)
        if self._next is not None:
            self._next.save_pretrained(private / STATISTICS)
            hashed = {"sha256": sha256_of(private / STATISTICS / TENSORS)}
            after = {**after, "statistics": about_statistics(self._next) | hashed}
        room, used = report.series["room"], report.series["drift_used"]
        record = {
            "model": str(path), "where": self._where, "room": room and room["mean"], "drift_used": used["by_layer"],
        }  # fmt: skip
        write_json(private / RECORD, record)
        content = {
            "request": self.number, "nonce": self.commitment.nonce, "rows": list(self.commitment.rows),
            "commitment": self.commitment.whole, "source": report.request.get("source"),
            "method": {name: value for name, value in report.method.items() if name != "statistics"},
            "settings": report.settings,
            "weights": {"before": before["weights"], "after": after["weights"]},
            "statistics": {"before": before["statistics"], "after": after.get("statistics")},
            "metrics": [asdict(metric) for metric in report.metrics],
            "drift": {"relative": report.drift.get("relative"), "kl": report.drift.get("kl")},
            "series": {**report.series, "room": room and {k: room[k] for k in ("mean", "least")},
                         "drift_used": used["relative"]},
            "card": {name: sha256_of(path / name) for name in ("README.md", REPORT) if (path / name).is_file()},
            "versions": report.versions, "hardware": report.hardware,
        }  # fmt: skip
        try:
            entry = self.ledger.append("request", plain(content), after=len(self.done))
        except LedgerError:  # nothing was written; any other end leaves that open, and the folder where it is
            shutil.rmtree(private)
            raise
        for old in self.ledger.folder.glob(f"{PRIVATE}/*/{STATISTICS}"):
            if old.parent != private:  # of no use any more, and large
                shutil.rmtree(old)
        return entry

    def _private(self, entry: Entry) -> Path:
        return self.ledger.folder / PRIVATE / _name(entry.content["request"], entry.content["nonce"])

    def _record(self, entry: Entry) -> dict[str, Any]:
        path = self._private(entry) / RECORD
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise LedgerError(
                f"{path} cannot be read ({error}): without {PRIVATE} no request can follow; put it back, or begin "
                "another ledger"
            ) from error


def stepped(settings: Mapping[str, Any], step: float, number: int) -> dict[str, Any]:
    """Settings of the energy constraint at request `number`: each later one protects `step` more (PGU's code)."""
    energy = settings.get("energy", EnergyConstraint().energy)
    return {**settings, "energy": min(energy + step * (number - 1), 1.0)}


def _name(number: int, nonce: str) -> str:
    return f"{number:04d}-{nonce[:8]}"


def _root_mean_square(values: Iterable[float]) -> float:
    squares = [value**2 for value in values]
    return math.sqrt(fmean(squares)) if squares else 0.0
