"""Evaluation of an unlearned model next to the original and the retrained one, which are measured only once."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from hf_unlearn.core.text import ShortRepr
from hf_unlearn.data.batches import default_collator
from hf_unlearn.data.formats import Rows
from hf_unlearn.deletion.request import DeletionRequest
from hf_unlearn.deletion.samples import ForgetSamples, with_answers_after
from hf_unlearn.evaluation.evaluate import encode_splits, evaluate_unlearning, mark_content
from hf_unlearn.evaluation.measurements import MeasurementTools
from hf_unlearn.evaluation.metrics.base import TEST
from hf_unlearn.evaluation.report import MetricValue, UnlearningReport
from hf_unlearn.models.loading import load_model
from hf_unlearn.models.tasks import Collator, task_of
from hf_unlearn.trainer.config import UnlearningConfig
from hf_unlearn.trainer.trainer import UnlearningTrainer


@dataclass(frozen=True, repr=False)
class ReferenceResults(ShortRepr):
    """What does not change from one configuration to the next: results of the original and the retrained model.

    Attributes:
        metrics: Their metrics.
        entropies: Their output entropies on the forget set, in nats, by model.
        samples: Sample answers of the original model.
        splits: The rows that were evaluated; those of the forget set are encoded, and say which of their labels are
            content under the original model.
    """

    metrics: Sequence[MetricValue]
    entropies: Mapping[str, list[float]]
    samples: Sequence[dict[str, str]]
    splits: Mapping[str, Rows]


def evaluate_next_to_references(
    request: DeletionRequest,
    trainer: UnlearningTrainer,
    config: UnlearningConfig,
    references: ReferenceResults | None = None,
) -> tuple[UnlearningReport, ReferenceResults]:
    """Evaluate the unlearned model of `trainer`.

    Args:
        references: Results of an earlier run of the same request. Without them the reference models are measured too.

    Returns:
        A report with the metrics of all models, and the results of the reference models for the next run.
    """
    models, options = request.models, request.evaluation
    needs_retrained = references is None or options.metrics  # metrics that were asked for may compare with it
    collator = models.collator or default_collator(models.processing_class)
    splits = _marked_splits(request, trainer, config, collator) if references is None else references.splits
    report = evaluate_unlearning(
        trainer.model,
        splits,
        original=trainer.original_model if references is None else None,
        retrained=models.retrained if needs_retrained else None,
        metrics=options.metrics,
        processing_class=models.processing_class,
        collator=collator,
        batch_size=config.per_device_eval_batch_size,
        seed=config.seed,
        cache_dir=options.cache_dir,
    )
    answers = [] if options.sample_answers is None else options.sample_answers(trainer.model)
    if references is None:
        references = _reference_results(report, request, trainer, splits)
    unlearned_metrics = [metric for metric in report.metrics if metric.model == "unlearned"]
    report.metrics = [*references.metrics, *unlearned_metrics]
    report.entropies = {**references.entropies, "unlearned": report.entropies["unlearned"]}
    samples, says = options.sample_answers, []
    if isinstance(samples, ForgetSamples):
        says = samples.still_says(trainer.model, splits["forget"], [answer["answer"] for answer in answers])
    shown = with_answers_after(references.samples, answers, says)
    if isinstance(samples, ForgetSamples) and samples.private:
        report.private_samples = shown
    else:
        report.samples = shown
    return report, references


def _marked_splits(
    request: DeletionRequest, trainer: UnlearningTrainer, config: UnlearningConfig, collator: Collator
) -> dict[str, Rows]:
    """Return the splits; encoded forget and held-out rows say which labels are content if the metrics read it."""
    models, options = request.models, request.evaluation
    splits = {name: rows for name, rows in request.rows.splits.items() if name in ("forget", *TEST.split("|"))}
    splits = encode_splits(splits, models.processing_class, trainer.model)
    tools = MeasurementTools.build(models.processing_class, collator, config.per_device_eval_batch_size)
    name = options.reference_model

    @contextmanager
    def reference() -> Iterator[nn.Module]:
        yield load_model(str(name), task_of(models.original)).to(next(models.original.parameters()).device)

    marked = mark_content(splits, options.metrics, trainer.original_model, None if name is None else reference, tools)
    return {**request.rows.splits, **marked}


def _reference_results(
    report: UnlearningReport, request: DeletionRequest, trainer: UnlearningTrainer, splits: Mapping[str, Rows]
) -> ReferenceResults:
    samples: list[dict[str, str]] = []
    if request.evaluation.sample_answers is not None:
        with trainer.original_model() as original:
            samples = request.evaluation.sample_answers(original)
    return ReferenceResults(
        metrics=[metric for metric in report.metrics if metric.model != "unlearned"],
        entropies={model: values for model, values in report.entropies.items() if model != "unlearned"},
        samples=samples,
        splits=splits,
    )
