"""A series of deletion requests on one model: what each request starts from.

The procedure is PGU's (WACV 2024, section 3.3): the retain statistics of one request are the full statistics of the
next. In formulas: let W_0 be the weights that the statistics were collected on, F_j the rows of request j, and W_j the
weights after it. Request k is constrained by

    S_k = G(all rows; W_0) - G(F_1; W_0) - G(F_2; W_1) - ... - G(F_k; W_(k-1)),

because the statistics of a forget set are collected on the model that exists when the request arrives. The original,
which knows all rows, need not be kept. S_k differs in two ways from the statistics of the remaining rows on the current
weights:
1. S_k keeps the sum over j of G(F_j; W_0) - G(F_j; W_(j-1)). The rows of F_j were retain rows until request j, and
   their inputs moved only as much as the constraint allowed. `negative_share` shows the part of this sum that makes S_k
   indefinite; the rest cannot be seen without rows.
2. The remaining rows have moved, too, by about the drift that was predicted.
Both differences vanish with energy 1.0 and full coverage, and grow with each request below that. They end when
statistics are collected again on the last model (`hf-unlearn collect`, then `--statistics`), which reads the retain
rows. Negative energy is clamped, so that steps along its directions are not constrained: `room` then grows, and the
predicted drift, which is computed from the same S_k, does not see what happens there. That is why a share above
`NEGATIVE` causes a warning (digits, a class at each request: on one seed 3% at the third, with retain accuracy at 0.97,
and 0.76 two requests later; docs/results/series.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hf_unlearn.constraints.energy import EnergyConstraint
from hf_unlearn.core.files import sha256_of
from hf_unlearn.core.processes import gather
from hf_unlearn.core.text import ShortRepr
from hf_unlearn.data.formats import Row
from hf_unlearn.deletion.ledger_entries import Entry
from hf_unlearn.deletion.ledger_key import Commitment
from hf_unlearn.deletion.series_entry import RequestOutcome, SeriesEntry
from hf_unlearn.deletion.series_files import STATISTICS, RequestRecord, folder_of_entry, read_record
from hf_unlearn.deletion.series_report import add_series, root_mean_square
from hf_unlearn.errors import DataError, LedgerError
from hf_unlearn.models.fingerprint import weights_fingerprint
from hf_unlearn.statistics.retain_statistics import RetainStatistics
from hf_unlearn.statistics.serialisation import TENSORS

if TYPE_CHECKING:
    from torch import nn

    from hf_unlearn.deletion.ledger import Ledger
    from hf_unlearn.evaluation.report import UnlearningReport


@dataclass(frozen=True, repr=False)
class EarlierRows(ShortRepr):
    """The forget rows of earlier requests, which are tested again.

    Attributes:
        rows: Number of the request -> its rows.
        untested: Number of the request -> why its rows cannot be tested.
    """

    rows: Mapping[int, Sequence[Row]] = field(default_factory=dict)
    untested: Mapping[int, str] = field(default_factory=dict)


class RequestSeries:
    """The completed requests of one ledger, and what the next request starts from.

    Next to the ledger, `_private/` has a folder for each request: where its rows are (names of splits, no rows) and
    where its model is; that of the last request also has the statistics for the next one. `_private/` must not be
    published.

    >>> import secrets, tempfile
    >>> from hf_unlearn.deletion import Ledger, RequestSeries
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     series = RequestSeries(Ledger(folder, secrets.token_bytes(32)))
    ...     begun = series.begin([{"question": "Who is Anna?", "answer": "A pilot."}])
    >>> series.number, len(begun.commitment.rows)
    (1, 1)

    Pass `begun` as `series` of a `DeletionRequest`; when that is fulfilled, the ledger has an entry.

    Attributes:
        ledger: The ledger.
        completed: Entries of the completed requests, oldest first.

    Raises:
        LedgerError: The ledger is damaged, or its `_private/` is incomplete.
    """

    def __init__(self, ledger: Ledger):
        self.ledger = ledger
        self.completed: Sequence[Entry] = ledger.requests()
        self.records: Sequence[RequestRecord] = [read_record(ledger.folder, entry) for entry in self.completed]

    @property
    def number(self) -> int:
        """Number of the next request, from 1."""
        return len(self.completed) + 1

    @property
    def model_folder(self) -> str | None:
        """Folder of the last request's model, or None before the first request."""
        return self.records[-1]["model"] if self.records else None

    @property
    def drift_by_layer(self) -> dict[str, float]:
        """Predicted relative drifts of all completed requests, summed layer by layer."""
        return dict(self.records[-1]["drift_used"]) if self.records else {}

    @property
    def drift_used(self) -> float:
        """Root mean square over layers of `drift_by_layer`."""
        return root_mean_square(self.drift_by_layer.values())

    def mark(self, forget_metric: str) -> float | None:
        """Return the forget metric of held-out rows before the first request, which every request aims at.

        The current model's value would fall with the damage of every request, and the next request would follow it.
        """
        metric = {"probability": "answer_probability"}.get(forget_metric, forget_metric)
        measured = self.completed[0].content["metrics"] if self.completed else []
        values = [
            m["value"] for m in measured if (m["name"], m["split"], m["model"]) == (metric, "holdout", "original")
        ]
        return values[0] if values else None

    def check_model(self, model: nn.Module) -> None:
        """Raise `LedgerError` unless `model` has exactly the weights that the last request ended with."""
        if not self.completed:
            return
        expected, seen = self.completed[-1].content["weights"]["after"], weights_fingerprint(model)
        if seen != expected:
            raise LedgerError(
                f"the model has weights {seen[:12]}, but request {self.number - 1} of {self.ledger.folder} ended with "
                f"{expected[:12]}; start from that model, or begin another ledger"
            )

    def statistics(self, model: nn.Module) -> RetainStatistics | None:
        """Return the statistics that the last request left for the next one, or None if it had none.

        Raises:
            LedgerError: The files are missing, or are not those of the ledger.
            StatisticsError: They are not statistics of `model`.
        """
        if not self.completed:
            return None
        recorded = self.completed[-1].content["statistics"]["after"]
        if recorded is None:
            return None
        folder = folder_of_entry(self.ledger.folder, self.completed[-1]) / STATISTICS
        if not (folder / TENSORS).is_file() or sha256_of(folder / TENSORS) != recorded["sha256"]:
            raise LedgerError(
                f"{folder} is missing or differs from what the ledger recorded; collect statistics again on the last "
                "model (hf-unlearn collect) and pass --statistics"
            )
        return RetainStatistics.from_pretrained(folder, model=model)

    def earlier(self, load: Callable[[Mapping[str, Any]], Sequence[Row]]) -> EarlierRows:
        """Return the rows of earlier requests, to be tested again, if they match their commitments.

        Args:
            load: Takes the `where` of `begin`, and returns the rows. It raises `DataError` if they do not exist any
                more, which is normal after the data was erased.
        """
        rows: dict[int, Sequence[Row]] = {}
        untested: dict[int, str] = {}
        for entry, record in zip(self.completed, self.records, strict=True):
            number = entry.content["request"]
            try:
                loaded = load(record["where"])
            except DataError:
                untested[number] = "not available"  # the report is published: it says no more
                continue
            if self.ledger.holds(entry, loaded):
                rows[number] = loaded
            else:
                untested[number] = "the available rows are not those of the request"
        return EarlierRows(rows, untested)

    def begin(
        self, rows: Sequence[Row], where: Mapping[str, Any] | None = None, untested: Mapping[int, str] | None = None
    ) -> BegunRequest:
        """Commit to the rows to forget.

        Args:
            rows: Raw rows, as users have them, so that `ledger prove` finds them.
            where: JSON that finds them again, for `earlier`.
            untested: `EarlierRows.untested`, for the report.

        Raises:
            DataError: A row was in an earlier request: its statistics would be subtracted twice.
            LedgerError: No key, or a key that is not the ledger's.
        """
        for entry in self.completed:
            tags = set(entry.content["rows"])
            twice = [index for index, row in enumerate(rows) if self.ledger.tag(entry.content["nonce"], row) in tags]
            if twice:
                raise DataError(
                    f"{len(twice)} forget rows (first: row {twice[0]}) were already in request "
                    f"{entry.content['request']}, completed {entry.time}; leave them out"
                )
        return BegunRequest(self, gather(self.ledger.commit(rows))[0], dict(where or {}), dict(untested or {}))


@dataclass(frozen=True, repr=False)
class BegunRequest(ShortRepr):
    """The next request of a series, which has committed to its rows.

    Attributes:
        series: The requests before it.
        commitment: To the rows to forget.
        where: JSON that finds the rows again.
        untested: Earlier requests whose rows cannot be tested: number -> why.
    """

    series: RequestSeries
    commitment: Commitment
    where: Mapping[str, Any]
    untested: Mapping[int, str]

    def finish(self, report: UnlearningReport, outcome: RequestOutcome) -> SeriesEntry:
        """Add to the report what only the series knows, warn about what runs out, and return the entry to write.

        Args:
            report: The otherwise complete report of this request; `request` and `series` are changed in place.
            outcome: Weights and statistics before and after.
        """
        add_series(report, self, outcome)
        return SeriesEntry.of(self, report, outcome)


def raised_energy(settings: Mapping[str, Any], step: float, number: int) -> dict[str, Any]:
    """Return settings of the energy constraint for request `number`: each later one protects `step` more (PGU's code).

    >>> [raised_energy({"energy": 0.5}, 0.25, number)["energy"] for number in (1, 2, 3, 4)]
    [0.5, 0.75, 1.0, 1.0]
    """
    energy = settings.get("energy", EnergyConstraint().energy)
    return {**settings, "energy": min(energy + step * (number - 1), 1.0)}
