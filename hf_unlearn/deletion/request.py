"""`DeletionRequest`: what is to be forgotten, from which model, and how the result is evaluated.

A request is a frozen description; `fulfil.py` carries it out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hf_unlearn.core.text import ShortRepr
from hf_unlearn.data.formats import Rows
from hf_unlearn.models.tasks import Collator, ProcessingClass

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

    from hf_unlearn.deletion.series import BegunRequest
    from hf_unlearn.statistics.retain_statistics import RetainStatistics


@dataclass(frozen=True, kw_only=True, repr=False)
class RequestModels(ShortRepr):
    """The models of a request.

    >>> from torch import nn
    >>> RequestModels(original=nn.Linear(2, 2)).retrained is None
    True

    Attributes:
        original: The model that is unlearned. It has the original weights again after the request is fulfilled.
        retrained: The model trained without the forget rows, to compare with.
        processing_class: Tokenizer or image processor. It encodes raw rows and is saved next to the model.
        collator: Rows to batch; default pads on the right.
    """

    original: nn.Module
    retrained: nn.Module | None = None
    processing_class: ProcessingClass | None = None
    collator: Collator | None = None


@dataclass(frozen=True, kw_only=True, repr=False)
class RequestRows(ShortRepr):
    """The rows of a request.

    >>> rows = RequestRows(forget=[{"text": "a"}], evaluation={"retain": [{"text": "b"}, {"text": "c"}]})
    >>> {name: len(split) for name, split in rows.splits.items()}
    {'forget': 1, 'retain': 2}

    Attributes:
        forget: Rows to forget.
        evaluation: Further rows to evaluate on, by split name: `retain`, `holdout`, ... They are not read while
            unlearning, except by the stopping rules (`holdout`; `retain` with `max_retain_drop`).
        retain: Retain rows for the loss, if it has a retain term.
        rehearsal: Rows that the model never saw, for a retain term that holds it to the original's predictions
            (`UnlearningTrainer`); not among those of `evaluation`.
        forgotten_before: Rows of earlier requests to train on again, so that they stay forgotten. They are not
            subtracted from the statistics, and the stopping rule does not look at them.
        copies: Further copies of forget rows that the statistics include. They are subtracted with the forget rows.
        source: Where the rows come from, for the report. Must not name a row.
        counts: Rows, and rows and tokens that were cut, of further sets that were read, such as `train`, by name
            (`LeftOut.record`), for the report.
    """

    forget: Rows
    evaluation: Mapping[str, Rows] = field(default_factory=dict)
    retain: Rows | None = None
    rehearsal: Rows | None = None
    forgotten_before: Rows = ()
    copies: Rows = ()
    source: str = ""
    counts: Mapping[str, Mapping[str, int]] = field(default_factory=dict)

    @property
    def splits(self) -> dict[str, Rows]:
        """All splits that the models are evaluated on: `forget`, then those of `evaluation`."""
        return {"forget": self.forget, **self.evaluation}


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """How the unlearned model and the reference models are evaluated.

    >>> EvaluationOptions(metrics=["default", "extraction_strength"]).metrics
    ['default', 'extraction_strength']

    Attributes:
        metrics: Names of metrics or suites, as in `evaluate_unlearning`.
        cache_dir: Folder that keeps what was measured, so that no model is scored twice on the same rows.
        reference_model: Folder or Hub id of the checkpoint before the original was fine-tuned, which shows what the
            original has learned from the forget rows.
        sample_answers: Return answers of a model to show in the report (`prompt` and `answer`). It is called with the
            original and with the unlearned model.
    """

    metrics: Sequence[str] | None = None
    cache_dir: Path | None = None
    reference_model: str | None = None
    sample_answers: Callable[[nn.Module], list[dict[str, str]]] | None = None


@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """Train a PEFT adapter instead of the weights.

    >>> from peft import LoraConfig
    >>> AdapterOptions(peft_config=LoraConfig(r=8), merge=True).merge
    True

    Attributes:
        peft_config: Configuration of the adapter; see `UnlearningTrainer`.
        merge: Save the merged model instead of the adapter.
    """

    peft_config: PeftConfig
    merge: bool = False


@dataclass(frozen=True, kw_only=True, repr=False)
class DeletionRequest(ShortRepr):
    """What is to be forgotten, from which model, and how the result is evaluated.

    `fulfil_request` carries it out. The hyper-parameters are not part of it: one request can be fulfilled under
    several `UnlearningConfig`s.

    >>> from torch import nn
    >>> from hf_unlearn.deletion import DeletionRequest, RequestModels, RequestRows
    >>> rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4, 5, 6], "labels": [4, 5, 6]}]
    >>> request = DeletionRequest(
    ...     models=RequestModels(original=nn.Linear(2, 2)),
    ...     rows=RequestRows(forget=rows[:1], evaluation={"retain": rows[1:]}),
    ... )
    >>> list(request.rows.splits)
    ['forget', 'retain']

    Attributes:
        models: The original model and, to compare with, the retrained one.
        rows: Rows to forget and rows to evaluate on.
        statistics: Statistics of the full training set, or of the retain set if `subtract_forget` is false. None if no
            constraint is used.
        subtract_forget: The statistics include the forget rows: subtract theirs first.
        evaluation: Metrics, cache and sample answers.
        adapter: Train this adapter; None trains the weights.
        series: The request's place in a series, as `RequestSeries.begin` returns it. The ledger gets an entry when the
            output folder is written.
        card: Licence, language and data sets for the metadata of the card, as `license`, `language` and `datasets`.
        timings: Seconds spent before this request (training, collecting), by phase.
    """

    models: RequestModels
    rows: RequestRows
    statistics: RetainStatistics | None = None
    subtract_forget: bool = True
    evaluation: EvaluationOptions = EvaluationOptions()
    adapter: AdapterOptions | None = None
    series: BegunRequest | None = None
    card: Mapping[str, str | list[str]] = field(default_factory=dict)
    timings: Mapping[str, float] = field(default_factory=dict)
