"""What an attack receives (`Subject`) and what it yields (`Outcome`, `Skipped`)."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from hf_unlearn.core.text import ShortRepr
from hf_unlearn.data.formats import Rows
from hf_unlearn.evaluation.measurements import Columns, MeasurementTools, measure
from hf_unlearn.evaluation.metrics.intervals import Estimate
from hf_unlearn.evaluation.row_scores import score_rows

Memory = Literal["more", "less", "either", "chance", "none"]


class NotRun(Exception):
    """Raised by an attack that the model or the rows do not allow; the message is the reason in the report."""


@dataclass(frozen=True)
class AuditSettings:
    """Strength of the attacks.

    >>> AuditSettings(relearn_steps=20).relearn_rows
    5

    Attributes:
        relearn_rows: Number of forget rows that the attacker has, at most half of them.
        relearn_steps: Steps of relearning, each on all of those rows.
        relearn_learning_rate: Learning rate of AdamW; 2e-5 is OpenUnlearning's.
        margin: A model has relearned once its score is within this share of the original model's score.
        shots: Number of other rows shown before each forget row.
        seed: Seed of the choice of rows, of the probe's folds and of the bootstrap.
    """

    relearn_rows: int = 5
    relearn_steps: int = 8
    relearn_learning_rate: float = 2e-5
    margin: float = 0.05
    shots: int = 3
    seed: int = 0


@dataclass(frozen=True, repr=False)
class Shadow(ShortRepr):
    """A classifier that the attacker trained on `members` and not on `others`, to learn how the two differ."""

    model: nn.Module
    members: Rows
    others: Rows


@dataclass(frozen=True, repr=False)
class Subject(ShortRepr):
    """A model under attack.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_unlearn.data.batches import PaddingCollator
    >>> sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    >>> rows = {"forget": [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}]}
    >>> tools = MeasurementTools(PaddingCollator())
    >>> subject = Subject(LlamaForCausalLM(LlamaConfig(**sizes)), rows, tools, AuditSettings())
    >>> subject.score_name, subject.score(rows["forget"]).shape
    ('probability', (1,))

    Attributes:
        model: The model. An attack restores whatever it changes (see `models.modes.restored`).
        rows: Encoded rows by split; at least `forget`.
        tools: Collator, tokenizer and batch size.
        settings: Strength of the attacks.
        original: The original model's score of each forget row (see `score`), if there is an original model.
        shadows: Shadow models, if the attacker has any.
        name: `unlearned` or `retrained`.
        retrained: The retrained model, for attacks that use it as a reference; None for the retrained model itself.
    """

    model: nn.Module
    rows: Mapping[str, Rows]
    tools: MeasurementTools
    settings: AuditSettings
    original: NDArray | None = None
    shadows: Sequence[Shadow] = ()
    name: str = "unlearned"
    retrained: "Subject | None" = None
    _columns: dict[tuple[str, str], Columns] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def score_name(self) -> str:
        """The score that shows memory: `accuracy` of a classifier, `probability` of an answer."""
        row = self.rows["forget"][0]
        return "probability" if np.ndim(row.get("labels", row.get("label"))) else "accuracy"

    def score(self, rows: Rows) -> NDArray:
        """Return the score (see `score_name`) of each row under the model's current weights: `[N]`."""
        return getattr(score_rows(self.model, rows, self.tools.collator, self.tools.batch_size), self.score_name)

    def split(self, *names: str) -> Rows:
        """Return the rows of the first of these splits that is given; raise `NotRun` if none is."""
        for name in names:
            if name in self.rows:
                return self.rows[name]
        raise NotRun(f"it needs a split {' or '.join(names)}")

    def columns(self, wanted: Mapping[str, Iterable[str]]) -> dict[str, Columns]:
        """Return the columns of the wanted measurements by split, under the unchanged weights; each is taken once."""
        by_split: dict[str, Columns] = {}
        for split, names in wanted.items():
            for name in sorted(names):
                if (split, name) not in self._columns:
                    self._columns[split, name] = measure([name], self.model, self.rows[split], self.tools)
                by_split[split] = {**by_split.get(split, {}), **self._columns[split, name]}
        return by_split


@dataclass(frozen=True)
class Outcome:
    """A number that results from an attack.

    >>> Outcome("relearned_probability", "forget", Estimate(0.4, 0.3, 0.5, n=20), memory="more").estimate.value
    0.4

    Attributes:
        name, split: Name and split in the report.
        estimate: The number.
        memory: What the number says about memory, for the verdict. `more` or `less`: more or less of it than in the
            retrained model means that the model remembers; `either`: any difference does; `chance`: a value other
            than 0.5 does, without a comparison; `none`: it describes side effects of the attack.
        anamnesis_index: If the number counts steps of relearning: the name under which its ratio to the retrained
            model's number is reported.
    """

    name: str
    split: str
    estimate: Estimate
    memory: Memory = "more"
    anamnesis_index: str = ""


@dataclass(frozen=True)
class Skipped:
    """A number that an attack cannot give for this model or these rows, and the reason; the rest of the attack runs."""

    name: str
    reason: str
