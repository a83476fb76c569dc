"""What every attack gets: a model with the rows to judge it on, and how it is put back afterwards."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from hf_unlearn.evaluation.measurements import MeasurementTools
from hf_unlearn.evaluation.metrics.intervals import Estimate
from hf_unlearn.evaluation.row_scores import score_rows

Memory = Literal["more", "less", "either", "none"]


class NotRun(Exception):
    """An attack that this model or these rows do not allow; the message says why, and it is reported."""


@dataclass(frozen=True)
class AuditSettings:
    """How hard to attack.

    Attributes:
        relearn_rows: Forget rows that the attacker has, at most half of them.
        relearn_steps: Steps of relearning, each on all those rows.
        relearn_learning_rate: Of AdamW; 2e-5 is OpenUnlearning's.
        margin: Relearnt is what is back within this share of the original model's score.
        shots: Other rows shown before each forget row.
        seed: Of the choice of rows, the probe's folds and the bootstrap.
    """

    relearn_rows: int = 5
    relearn_steps: int = 8
    relearn_learning_rate: float = 2e-5
    margin: float = 0.05
    shots: int = 3
    seed: int = 0


@dataclass(frozen=True)
class Shadow:
    """A classifier that the attacker trained on `members`, and not on `others`, to see how the two differ."""

    model: nn.Module
    members: Any
    others: Any


@dataclass(frozen=True)
class Subject:
    """A model under attack.

    Attributes:
        model: Put back into its state after each attack.
        rows: Encoded rows by split; at least `forget`.
        tools: Collator, tokenizer, batch size.
        settings: How hard to attack.
        original: The original model's score of forget rows, by the same measure, if there is one.
        shadows: Shadow models, if the attacker has any.
    """

    model: nn.Module
    rows: Mapping[str, Any]
    tools: MeasurementTools
    settings: AuditSettings
    original: NDArray | None = None
    shadows: Sequence[Shadow] = ()

    @property
    def measure(self) -> str:
        """What tells memory: accuracy of a classifier, probability of an answer."""
        row = self.rows["forget"][0]
        return "probability" if np.ndim(row.get("labels", row.get("label"))) else "accuracy"

    def score(self, rows: Any) -> NDArray:
        """The measure of each row under the model as it is."""
        return getattr(score_rows(self.model, rows, self.tools.collator, self.tools.batch_size), self.measure)

    def split(self, *names: str) -> Any:
        """Rows of the first of these splits that there is; `NotRun` without any."""
        for name in names:
            if name in self.rows:
                return self.rows[name]
        raise NotRun(f"it needs a split {' or '.join(names)}")


@dataclass(frozen=True)
class Outcome:
    """A number that an attack came to.

    Attributes:
        name, split: As in the report.
        estimate: The number.
        memory: Whether more or less of it than in the retrained model tells of memory, either does, or none (it
            describes the attack's side effects).
    """

    name: str
    split: str
    estimate: Estimate
    memory: Memory = "more"


Attack = Callable[[Subject], Iterator[Outcome]]
