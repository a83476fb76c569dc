"""`SeriesEntry`: writing a completed request to the ledger, and what the next request needs next to it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_unlearn.core.files import sha256_of, write_json
from hf_unlearn.core.text import ShortRepr
from hf_unlearn.deletion.carried_statistics import carry, identify_statistics
from hf_unlearn.deletion.series_files import PRIVATE, RECORD, STATISTICS, RequestRecord, private_folder
from hf_unlearn.errors import LedgerError
from hf_unlearn.evaluation.report import REPORT, UnlearningReport, plain
from hf_unlearn.statistics.retain_statistics import RetainStatistics
from hf_unlearn.statistics.serialisation import TENSORS

if TYPE_CHECKING:
    from hf_unlearn.constraints.base import ConstraintLike
    from hf_unlearn.deletion.ledger_entries import Entry
    from hf_unlearn.deletion.series import BegunRequest


@dataclass(frozen=True, kw_only=True)
class RequestOutcome:
    """The weights and statistics of a request.

    Attributes:
        weights_before, weights_after: Fingerprints; `weights_after` is needed on the main process only.
        full: Statistics that the request started from.
        forget: Statistics of the forget rows.
        retain: Statistics that the request was constrained by.
        constraint: Its constraint.
    """

    weights_before: str
    weights_after: str
    full: RetainStatistics | None
    forget: RetainStatistics | None
    retain: RetainStatistics | None
    constraint: ConstraintLike


@dataclass(frozen=True, repr=False)
class SeriesEntry(ShortRepr):
    """Everything that completes a request of a series, ready to be written.

    Attributes:
        begun: The request and its commitment.
        report: Its report, with the part of the series.
        weights: Fingerprints before and after.
        statistics_before: Which statistics the request started from.
        carried: Statistics for the next request.
    """

    begun: BegunRequest
    report: UnlearningReport
    weights: Mapping[str, str]
    statistics_before: Mapping[str, Any] | None
    carried: RetainStatistics | None

    @classmethod
    def of(cls, begun: BegunRequest, report: UnlearningReport, outcome: RequestOutcome) -> SeriesEntry:
        """Return the entry of a request with this report and outcome."""
        return cls(
            begun,
            report,
            {"before": outcome.weights_before, "after": outcome.weights_after},
            None if outcome.full is None else identify_statistics(outcome.full),
            None if outcome.retain is None else carry(outcome.retain, outcome.weights_after),
        )

    def complete(self, folder: str | os.PathLike) -> Entry:
        """Keep what the next request needs, then append the entry, which makes the request a completed one.

        Call it in one process, after the output folder is in its place. If the process is killed before the entry is
        written, the series is in the state before the request.

        Args:
            folder: The output folder.

        Raises:
            LedgerError: See `Ledger.append`; nothing is kept then.
        """
        output = Path(folder).resolve()
        series, commitment = self.begun.series, self.begun.commitment
        ledger = series.ledger
        private = private_folder(ledger.folder, series.number, commitment.nonce)
        shutil.rmtree(private, ignore_errors=True)
        private.mkdir(parents=True)
        private.parent.chmod(0o700)
        statistics_after = self._save_carried(private)
        write_json(private / RECORD, self._record(output))
        content = plain(self._content(output, statistics_after))
        try:
            entry = ledger.append("request", content, after=len(series.completed))
        except LedgerError:  # nothing was written; after any other error that is not certain, and the folder stays
            shutil.rmtree(private)
            raise
        for old in ledger.folder.glob(f"{PRIVATE}/*/{STATISTICS}"):
            if old.parent != private:  # no longer needed, and large
                shutil.rmtree(old)
        return entry

    def _save_carried(self, private: Path) -> dict[str, Any] | None:
        """Save the statistics for the next request; return what the ledger says about them."""
        if self.carried is None:
            return None
        self.carried.save_pretrained(private / STATISTICS)
        return {**identify_statistics(self.carried), "sha256": sha256_of(private / STATISTICS / TENSORS)}

    def _record(self, output: Path) -> RequestRecord:
        room = self.report.series["room"]
        return {
            "model": str(output),
            "where": dict(self.begun.where),
            "room": None if room is None else room["mean"],
            "drift_used": self.report.series["drift_used"]["by_layer"],
        }

    def _content(self, output: Path, statistics_after: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the public content of the ledger's entry; it names no row."""
        report, commitment = self.report, self.begun.commitment
        room = report.series["room"]
        series = {
            **report.series,
            "room": None if room is None else {name: room[name] for name in ("mean", "least")},
            "drift_used": report.series["drift_used"]["relative"],
        }
        published = [name for name in ("README.md", REPORT) if (output / name).is_file()]
        return {
            "request": self.begun.series.number,
            "nonce": commitment.nonce,
            "rows": list(commitment.rows),
            "commitment": commitment.whole,
            "source": report.request.get("source"),
            "method": {name: value for name, value in report.method.items() if name != "statistics"},
            "outcome": report.outcome,
            "settings": report.settings,
            "weights": self.weights,
            "statistics": {"before": self.statistics_before, "after": statistics_after},
            "metrics": [asdict(metric) for metric in report.metrics],
            "drift": {"relative": report.drift.get("relative"), "kl": report.drift.get("kl")},
            "series": series,
            "card": {name: sha256_of(output / name) for name in published},
            "versions": report.versions,
            "hardware": report.hardware,
        }
