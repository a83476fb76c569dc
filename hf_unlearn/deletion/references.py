"""Evaluation of an unlearned model next to the original and the retrained one, which are measured only once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hf_unlearn.core.text import ShortRepr
from hf_unlearn.data.batches import default_collator
from hf_unlearn.deletion.request import DeletionRequest
from hf_unlearn.evaluation.evaluate import evaluate_unlearning
from hf_unlearn.evaluation.report import MetricValue, UnlearningReport
from hf_unlearn.trainer.config import UnlearningConfig
from hf_unlearn.trainer.trainer import UnlearningTrainer


@dataclass(frozen=True, repr=False)
class ReferenceResults(ShortRepr):
    """What does not change from one configuration to the next: results of the original and the retrained model.

    Attributes:
        metrics: Their metrics.
        entropies: Their output entropies on the forget set, in nats, by model.
        samples: Sample answers of the original model.
    """

    metrics: Sequence[MetricValue]
    entropies: Mapping[str, list[float]]
    samples: Sequence[dict[str, str]]


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
    report = evaluate_unlearning(
        trainer.model,
        request.rows.splits,
        original=trainer.original_model if references is None else None,
        retrained=models.retrained if needs_retrained else None,
        metrics=options.metrics,
        processing_class=models.processing_class,
        collator=models.collator or default_collator(models.processing_class),
        batch_size=config.per_device_eval_batch_size,
        seed=config.seed,
        cache_dir=options.cache_dir,
    )
    answers = [] if options.sample_answers is None else options.sample_answers(trainer.model)
    if references is None:
        references = _reference_results(report, request, trainer)
    unlearned_metrics = [metric for metric in report.metrics if metric.model == "unlearned"]
    report.metrics = [*references.metrics, *unlearned_metrics]
    report.entropies = {**references.entropies, "unlearned": report.entropies["unlearned"]}
    report.samples = [
        {**before, "after": after["answer"]} for before, after in zip(references.samples, answers, strict=True)
    ]
    return report, references


def _reference_results(
    report: UnlearningReport, request: DeletionRequest, trainer: UnlearningTrainer
) -> ReferenceResults:
    samples: list[dict[str, str]] = []
    if request.evaluation.sample_answers is not None:
        with trainer.original_model() as original:
            samples = request.evaluation.sample_answers(original)
    return ReferenceResults(
        metrics=[metric for metric in report.metrics if metric.model != "unlearned"],
        entropies={model: values for model, values in report.entropies.items() if model != "unlearned"},
        samples=samples,
    )
