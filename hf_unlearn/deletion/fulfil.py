"""From a `DeletionRequest` to a finished output folder.

    DeletionRequest --prepare_request--> PreparedRequest --fulfil--> FinishedRequest

Preparing subtracts the statistics of the forget rows. A prepared request can be fulfilled under several
configurations, each from the same original weights.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from torch import Tensor

from hf_unlearn.core.files import replace_folder
from hf_unlearn.core.processes import is_main, wait_for_all
from hf_unlearn.core.text import ShortRepr
from hf_unlearn.data.formats import rows_of
from hf_unlearn.deletion.output import (
    check_target,
    checkpoint_folder,
    merges_adapter,
    push_finished,
    save_model,
    saved_fingerprint,
)
from hf_unlearn.deletion.references import ReferenceResults, evaluate_next_to_references
from hf_unlearn.deletion.request import DeletionRequest
from hf_unlearn.deletion.series import BegunRequest
from hf_unlearn.deletion.series_entry import RequestOutcome, SeriesEntry
from hf_unlearn.deletion.timing import timed
from hf_unlearn.evaluation.report import UnlearningReport
from hf_unlearn.models.fingerprint import weights_fingerprint
from hf_unlearn.models.modes import trainable_flags_restored
from hf_unlearn.publishing.model_folder import complete_folder
from hf_unlearn.statistics.collect import collect_with_options
from hf_unlearn.statistics.options import CollectionOptions
from hf_unlearn.statistics.retain_statistics import RetainStatistics
from hf_unlearn.trainer.config import UnlearningConfig
from hf_unlearn.trainer.run_record import record_run
from hf_unlearn.trainer.trainer import UnlearningTrainer


def fulfil_request(request: DeletionRequest, config: UnlearningConfig) -> UnlearningReport:
    """Unlearn, evaluate, and write model, report, card and plots to `config.output_dir`.

    The folder appears at the end in one rename. Until then an existing folder is not touched.

    >>> import tempfile
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_unlearn import UnlearningConfig, collect_statistics
    >>> from hf_unlearn.deletion import DeletionRequest, RequestModels, RequestRows, fulfil_request
    >>> sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes))
    >>> ids = [[token, token + 1, token + 2, token + 3] for token in range(1, 9)]
    >>> rows = [{"input_ids": row, "labels": row} for row in ids]
    >>> request = DeletionRequest(
    ...     models=RequestModels(original=model),
    ...     rows=RequestRows(forget=rows[:2], evaluation={"retain": rows[2:]}),
    ...     statistics=collect_statistics(model, rows, progress=False),
    ... )
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     config = UnlearningConfig(folder, max_steps=1, use_cpu=True, disable_tqdm=True, eval_strategy="no")
    ...     report = fulfil_request(request, config)
    >>> report.models, report.request["rows"], report.method["statistics"]["rows"]
    (['original', 'unlearned'], 2, 6)

    Raises:
        UnlearningError: Whatever is wrong with the request; nothing is written then.
    """
    (finished,) = fulfil_request_under(request, {config.constraint: config}).values()
    return finished.report


def fulfil_request_under(
    request: DeletionRequest, configs: Mapping[str, UnlearningConfig]
) -> dict[str, "FinishedRequest"]:
    """Fulfil one request under several configurations, each from the same original weights.

    The statistics are subtracted once, and the original and the retrained model are evaluated once.

    Args:
        request: What is to be forgotten.
        configs: At least one configuration, by name, each with an `output_dir` of its own.

    Returns:
        What `PreparedRequest.fulfil` returns, by the names of `configs`.

    Raises:
        UnlearningError: Whatever is wrong with the request or a configuration.
    """
    for config in configs.values():
        check_target(request, config)
    prepared = prepare_request(request, next(iter(configs.values())))
    finished: dict[str, FinishedRequest] = {}
    references: ReferenceResults | None = None
    for name, config in configs.items():
        finished[name] = prepared.fulfil(config, references)
        references = finished[name].references
    return finished


def prepare_request(request: DeletionRequest, config: UnlearningConfig) -> "PreparedRequest":
    """Subtract the statistics of the forget rows (PGU, section 3.3) and, in a series, check the model.

    Args:
        request: What is to be forgotten.
        config: Batch size, storage and memory of collecting on the forget rows; the constraint does not matter.

    Raises:
        LedgerError: In a series, a model other than the one that the last request ended with.
        StatisticsError: Statistics of another model or of other rows.
    """
    weights_before = ""
    if request.series is not None:
        request.series.series.check_model(request.models.original)
        weights_before = weights_fingerprint(request.models.original)
    timings = dict(request.timings)
    with timed(timings, "subtract"):
        forget = _forget_statistics(request, config)
        retain = request.statistics
        if retain is not None and forget is not None:
            retain = retain - forget
    return PreparedRequest(request, retain, forget, weights_before, timings)


def _forget_statistics(request: DeletionRequest, config: UnlearningConfig) -> RetainStatistics | None:
    """Collect the statistics of the forget rows on the original model, or return None if nothing is subtracted."""
    if request.statistics is None or not request.subtract_forget:
        return None
    options = replace(CollectionOptions.from_config(config), **request.statistics.matching_arguments)
    rows = request.rows
    return collect_with_options(
        request.models.original,
        [*rows_of(rows.forget), *rows_of(rows.copies)] if rows.copies else rows.forget,
        options,
        collator=request.models.collator,
        processing_class=request.models.processing_class,
    )


@dataclass(frozen=True)
class UnlearnedModel:
    """An unlearned model while it is in memory.

    Attributes:
        trainer: `trainer.model` has the unlearned weights.
        report: The complete report.
        references: Results of the reference models, for the next run.
    """

    trainer: UnlearningTrainer
    report: UnlearningReport
    references: ReferenceResults


@dataclass(frozen=True, repr=False)
class FinishedRequest(ShortRepr):
    """A fulfilled request.

    Attributes:
        report: The report, as it was saved.
        references: Results of the reference models, for the next run of the same prepared request.
        folder: The output folder.
    """

    report: UnlearningReport
    references: ReferenceResults
    folder: Path


@dataclass(frozen=True, repr=False)
class PreparedRequest(ShortRepr):
    """A request that is ready to be fulfilled, under one configuration or several.

    Attributes:
        request: What is to be forgotten.
        retain_statistics: Statistics of the retain set, which the constraint uses.
        forget_statistics: What was subtracted; None if nothing was.
        weights_before: Fingerprint of the original weights; empty for a request outside of a series.
        timings: Seconds by phase, so far.
    """

    request: DeletionRequest
    retain_statistics: RetainStatistics | None
    forget_statistics: RetainStatistics | None
    weights_before: str
    timings: Mapping[str, float]

    def fulfil(self, config: UnlearningConfig, references: ReferenceResults | None = None) -> FinishedRequest:
        """Unlearn, evaluate, and write model, report, card and plots to `config.output_dir`.

        Args:
            config: Hyper-parameters and output folder.
            references: `FinishedRequest.references` of an earlier run of this prepared request. With them the original
                and the retrained model are not evaluated again.

        Raises:
            UnlearningError: Whatever is wrong with the request; nothing is written then.
        """
        target = check_target(self.request, config)
        series = self.request.series
        with self.unlearned(config, target, references) as result:
            state = result.trainer.whole_state_dict()
            entry = None if series is None else self._series_entry(series, result, state, config)
            if is_main():
                with replace_folder(target, config.overwrite_output_dir) as folder:
                    save_model(folder, self.request, result.trainer, state, config)
                    complete_folder(folder, result.report, target.name, config.card_template)
                if entry is not None:
                    entry.complete(target)
            wait_for_all()
        if config.push_to_hub and is_main():
            push_finished(self.request, target, result.report, config)
        return FinishedRequest(result.report, result.references, target)

    @contextmanager
    def unlearned(
        self, config: UnlearningConfig, target: Path, references: ReferenceResults | None = None
    ) -> Iterator[UnlearnedModel]:
        """Scope with the unlearned and evaluated model in memory; nothing is written to `target`.

        When the scope ends, also by an exception, the model has its original weights again, and the parameters that
        the run froze are trainable again.

        Args:
            config: Hyper-parameters.
            target: Folder that gives the model its name in the report; checkpoints are written next to it.
            references: As in `fulfil`.
        """
        timings = dict(self.timings)
        with ExitStack() as cleanup:
            cleanup.enter_context(trainable_flags_restored(self.request.models.original))
            with checkpoint_folder(target) as checkpoints, timed(timings, "unlearn"):
                with timed(timings, "decompose"):
                    trainer = self._trainer(config, target, checkpoints)
                cleanup.callback(self._restore_original, trainer)
                trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
            with timed(timings, "evaluate"):
                report, references = evaluate_next_to_references(self.request, trainer, config, references)
            self._fill_report(report, trainer, timings)
            yield UnlearnedModel(trainer, report, references)

    def _trainer(self, config: UnlearningConfig, target: Path, checkpoints: Path) -> UnlearningTrainer:
        models, rows = self.request.models, self.request.rows
        config = config.but(output_dir=str(checkpoints), hub_model_id=config.hub_model_id or target.name)
        watch_retain = config.max_retain_drop is not None and "retain" in rows.splits
        trainer = UnlearningTrainer(
            models.original,
            config,
            [*rows_of(rows.forget), *rows_of(rows.forgotten_before)] if rows.forgotten_before else rows.forget,
            rows.retain,
            statistics=self.retain_statistics,
            holdout_dataset=rows.splits.get("holdout"),
            rehearsal_dataset=rows.rehearsal,
            data_collator=models.collator,
            eval_dataset={"retain": rows.splits["retain"]} if watch_retain else None,
            processing_class=models.processing_class,
            reference_model=self.request.evaluation.reference_model,
            peft_config=None if self.request.adapter is None else self.request.adapter.peft_config,
        )
        if self.request.series is not None:
            trainer.set_stopping_rows(rows.forget, self.request.series.series.mark(config.stopping_metric))
        return trainer

    def _restore_original(self, trainer: UnlearningTrainer) -> None:
        trainer.constrainer.restore()
        if self.request.adapter is not None:
            trainer.model.unload()

    def _fill_report(self, report: UnlearningReport, trainer: UnlearningTrainer, timings: dict[str, float]) -> None:
        rows = self.request.rows
        report.request = {
            "rows": len(rows.forget),
            "source": rows.source,
            "date": datetime.now(timezone.utc).date().isoformat(),
        }
        report.data |= trainer.row_counts | {name: dict(count) for name, count in rows.counts.items()}
        retain_rows = 0 if rows.retain is None else len(rows.retain)
        record_run(report, trainer, retain_rows=retain_rows, merged=merges_adapter(self.request))
        if self.request.card:
            report.method["card"] = dict(self.request.card)
        report.method["rows_forgotten_again"] = len(rows.forgotten_before)
        report.timings = timings

    def _series_entry(
        self,
        begun: BegunRequest,
        result: UnlearnedModel,
        state: dict[str, Tensor] | None,
        config: UnlearningConfig,
    ) -> SeriesEntry:
        """Return the entry of the ledger, and add to the report what only the series knows."""
        weights_after = (
            saved_fingerprint(self.request, result.trainer, state) if is_main() else ""
        )  # only it writes the entry
        outcome = RequestOutcome(
            weights_before=self.weights_before,
            weights_after=weights_after,
            full=self.request.statistics,
            forget=self.forget_statistics,
            retain=self.retain_statistics,
            constraint=config.build_constraint(),
        )
        return begun.finish(result.report, outcome)
