"""One deletion request from statistics to a finished output folder."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PrinterCallback

from hf_unlearn.core.files import check_output, replace_folder
from hf_unlearn.core.processes import is_main, wait_for_all
from hf_unlearn.data.batches import default_collator
from hf_unlearn.deletion.series import RequestSeries
from hf_unlearn.errors import SettingsError
from hf_unlearn.evaluation.evaluate import evaluate_unlearning
from hf_unlearn.evaluation.report import UnlearningReport
from hf_unlearn.models.adapters import merged_state_dict
from hf_unlearn.models.fingerprint import state_fingerprint, weights_fingerprint
from hf_unlearn.models.modes import flags_kept
from hf_unlearn.publishing.model_folder import complete_folder, push_unlearned_model
from hf_unlearn.statistics.collect import collect_with_options
from hf_unlearn.statistics.options import CollectionOptions
from hf_unlearn.statistics.retain_statistics import RetainStatistics
from hf_unlearn.trainer.config import UnlearningConfig
from hf_unlearn.trainer.run_record import describe, name_base_model
from hf_unlearn.trainer.trainer import UnlearningTrainer


@dataclass
class Request:
    """What is to be forgotten, from which model, and how to judge it.

    Attributes:
        model: The original model; it holds the original weights again after `fulfil`.
        forget: Rows to forget.
        splits: Rows to judge on: `forget`, `retain`, `holdout`, ...; none of them is read while unlearning, except by
            the stopping rules (`forget` and `holdout`; `retain` with `max_retain_drop`).
        statistics: Of the full training set, or of the retain set alone.
        subtract_forget: The statistics cover the forget rows: subtract theirs first.
        retain: Retain rows for the loss, if it has a retain term.
        retrained: The model trained without the forget rows, to compare with.
        processing_class, collator: As in `UnlearningTrainer`.
        peft_config: Train a LoRA adapter instead of the weights; see `UnlearningTrainer`.
        merge_adapter: Write the merged model instead of the adapter.
        source: Where the rows come from, in words, for the report.
        samples: Given a model, answers to show; called before and after.
        metrics: Names of metrics or suites, as in `evaluate_unlearning`.
        cache_dir: Where what was measured is kept, so that no model is scored twice on the same rows.
        timings: Seconds spent before this request (training, collecting).
        series: The requests that this one follows; its ledger gets an entry once the folder is there.
        again: Rows of earlier requests to train on as well, so that they stay forgotten; nothing of them is subtracted,
            and the stopping rule does not look at them.
    """

    model: nn.Module
    forget: Any
    splits: Mapping[str, Any]
    statistics: RetainStatistics | None = None
    subtract_forget: bool = True
    retain: Any = None
    retrained: nn.Module | None = None
    processing_class: Any = None
    collator: Callable | None = None
    peft_config: Any = None
    merge_adapter: bool = False
    source: str = ""
    samples: Callable[[nn.Module], list[dict[str, str]]] | None = None
    metrics: Sequence[str] | None = None
    cache_dir: Path | None = None
    timings: dict[str, float] = field(default_factory=dict)
    series: RequestSeries | None = None
    again: Sequence[Any] = ()
    _before: str = field(default="", init=False, repr=False)
    _forgotten: RetainStatistics | None = field(default=None, init=False, repr=False)
    _retained: RetainStatistics | None = field(default=None, init=False, repr=False)
    _references: UnlearningReport | None = field(default=None, init=False, repr=False)

    def fulfil(self, args: UnlearningConfig) -> UnlearningReport:
        """Unlearn, judge, and write checkpoint, report, card and plots to `args.output_dir`.

        The folder appears at the end in one rename; until then the old one, if any, is untouched.

        Raises:
            UnlearningError: Whatever is wrong with the request; nothing is written then.
        """
        target = check_output(args.output_dir or "unlearned", args.overwrite_output_dir)
        if self.series is not None:
            self._enter(self.series, target)
        with self.unlearned(args, target) as (trainer, report):
            state = trainer.whole_state_dict()
            if self.series is not None:
                self._describe_series(self.series, report, trainer, state, args)
            if is_main():
                with replace_folder(target, args.overwrite_output_dir) as folder:
                    self._write(folder, trainer, state, report, args, target.name)
                if self.series is not None:
                    self.series.complete(report, target)
            wait_for_all()
        if args.push_to_hub and is_main():
            self._push(target, report, args)
        return report

    @contextmanager
    def unlearned(self, args: UnlearningConfig, target: Path) -> Iterator[tuple[UnlearningTrainer, UnlearningReport]]:
        """The trainer with the unlearned model, and the report on it; afterwards the original weights are back and what
        the run froze may train again, in failure too.

        Args:
            target: Folder whose name the report's model has; checkpoints go beside it, and nothing into it.
        """
        if self._retained is None:
            with clock(self.timings, "subtract"):
                self._retained = self._retain_statistics(args)
        statistics, timings = self._retained, dict(self.timings)
        with ExitStack() as ending:
            ending.enter_context(flags_kept(self.model))
            with _scratch(target) as scratch, clock(timings, "unlearn"):
                with clock(timings, "decompose"):
                    own = args.but(output_dir=str(scratch), hub_model_id=args.hub_model_id or target.name)
                    trainer = self._trainer(own, statistics)
                ending.callback(self._put_back, trainer)
                trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
            with clock(timings, "evaluate"):
                report = self._judge(trainer, args)
            self._describe(report, trainer, timings)
            yield trainer, report

    def _put_back(self, trainer: UnlearningTrainer) -> None:
        trainer.constrainer.restore()
        if self.peft_config is not None:
            trainer.model.unload()

    def _push(self, folder: Path, report: UnlearningReport, args: UnlearningConfig) -> None:
        commit = push_unlearned_model(
            folder, folder, args.hub_model_id or folder.name, private=args.hub_private_repo, token=args.hub_token,
            revision=args.hub_revision, update=args.push_unfinished, publish_samples=self.samples is not None,
        )  # fmt: skip
        if self.series is not None:
            self.series.ledger.record_push(report.request["number"], commit.repo_url.repo_id, commit.oid)

    def _retain_statistics(self, args: UnlearningConfig) -> RetainStatistics | None:
        """Statistics of the full set minus those of the forget rows on the current model (PGU, section 3.3)."""
        if self.statistics is None or not self.subtract_forget:
            return self.statistics
        options = replace(CollectionOptions.from_config(args), **self.statistics.matching_arguments)
        forget = collect_with_options(
            self.model, self.forget, options, collator=self.collator, processing_class=self.processing_class
        )
        self._forgotten = forget
        return self.statistics - forget

    def _enter(self, series: RequestSeries, target: Path) -> None:
        """Check that this request can follow the last one, before any work."""
        if self.peft_config is not None and not self.merge_adapter:
            raise SettingsError("a series needs whole models to go on from; pass merge_adapter (--merge_adapter True)")
        if series.model_folder is not None and Path(series.model_folder) == target.resolve():
            raise SettingsError(f"{target} has the model that this request goes on from; choose another --output_dir")
        ledger = series.ledger.folder.resolve()
        if target.resolve() in (ledger, *ledger.parents):
            raise SettingsError(f"the ledger {ledger} must not be in the output folder, which is replaced as a whole")
        series.check_model(self.model)
        self._before = weights_fingerprint(self.model)
        if series.commitment is None:
            series.begin(self.forget)

    def _describe_series(
        self,
        series: RequestSeries,
        report: UnlearningReport,
        trainer: UnlearningTrainer,
        state: dict[str, Any] | None,
        args: UnlearningConfig,
    ) -> None:
        after = self._fingerprint(trainer, state) if is_main() else ""  # which completes the series
        series.describe(
            report, weights=(self._before, after), forget=self._forgotten, full=self.statistics, retain=self._retained,
            constraint=args.build_constraint(),
        )  # fmt: skip

    def _fingerprint(self, trainer: UnlearningTrainer, state: dict[str, Any] | None) -> str:
        """Of the weights that are written: gathered ones, which are tied no more, as the model that loads them."""
        if state is not None:
            tied = getattr(self.model, "all_tied_weights_keys", None) or {}
            state = state | {name: state[source] for name, source in tied.items() if source in state}
        if self.peft_config is not None:
            return state_fingerprint(merged_state_dict(trainer.model, state))
        return weights_fingerprint(trainer.model) if state is None else state_fingerprint(state)

    def _trainer(self, args: UnlearningConfig, statistics: RetainStatistics | None) -> UnlearningTrainer:
        forget = [*self.forget, *self.again] if self.again else self.forget
        watched = None
        if args.max_retain_drop is not None and "retain" in self.splits:
            watched = {"retain": self.splits["retain"]}
        trainer = UnlearningTrainer(
            self.model, args, forget, self.retain, statistics=statistics,
            holdout_dataset=self.splits.get("holdout"), data_collator=self.collator, eval_dataset=watched,
            processing_class=self.processing_class, peft_config=self.peft_config,
        )  # fmt: skip
        if self.series is not None:
            trainer.stop_by(self.forget, self.series.mark(args.forget_metric))
        if args.disable_tqdm:  # Trainer would print each log line instead; the report has them
            trainer.remove_callback(PrinterCallback)
        return trainer

    def _judge(self, trainer: UnlearningTrainer, args: UnlearningConfig) -> UnlearningReport:
        """Score the unlearned model; the original and the retrained one only at the first of several runs."""
        first = self._references is None
        report = evaluate_unlearning(
            trainer.model, self.splits, original=trainer.original_model if first else None,
            retrained=self.retrained if first or self.metrics else None, metrics=self.metrics,
            processing_class=self.processing_class,
            collator=self.collator or default_collator(self.processing_class),
            batch_size=args.per_device_eval_batch_size, seed=args.seed, cache_dir=self.cache_dir,
        )  # fmt: skip
        if self.samples is not None:
            report.samples = self.samples(trainer.model)
        if self._references is None:
            self._references = self._reference_part(report, trainer)
        report.metrics = [m for m in report.metrics if m.model == "unlearned"]
        report.metrics = self._references.metrics + report.metrics
        report.entropies = self._references.entropies | report.entropies
        answers = zip(self._references.samples, report.samples, strict=True)
        report.samples = [before | {"after": after["answer"]} for before, after in answers]
        return report

    def _reference_part(self, report: UnlearningReport, trainer: UnlearningTrainer) -> UnlearningReport:
        """What does not change from one constraint to the next."""
        references = UnlearningReport(metrics=[m for m in report.metrics if m.model != "unlearned"])
        references.entropies = {k: v for k, v in report.entropies.items() if k != "unlearned"}
        if self.samples is not None:
            with trainer.original_model() as original:
                references.samples = self.samples(original)
        return references

    def _describe(self, report: UnlearningReport, trainer: UnlearningTrainer, timings: dict[str, float]) -> None:
        report.request = {
            "rows": len(self.forget),
            "source": self.source,
            "date": datetime.now(timezone.utc).date().isoformat(),
        }
        describe(report, trainer, retain_rows=0 if self.retain is None else len(self.retain), merged=self.merge_adapter)
        report.method["rows_forgotten_again"] = len(self.again)
        report.timings = timings

    def _write(
        self,
        folder: Path,
        trainer: UnlearningTrainer,
        state: dict[str, Any] | None,
        report: UnlearningReport,
        args: UnlearningConfig,
        name: str,
    ) -> None:
        name_base_model(trainer.model, args)
        if self.peft_config is not None and self.merge_adapter:
            merged = merged_state_dict(trainer.model, state)
            self.model.save_pretrained(folder, state_dict=merged)  # type: ignore[operator]
        else:
            trainer.model.save_pretrained(folder, state_dict=state)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        complete_folder(folder, report, name, args.card_template)


@contextmanager
def clock(timings: dict[str, float], phase: str) -> Iterator[None]:
    """Note the seconds that a phase takes."""
    start = time.perf_counter()
    yield
    timings[phase] = round(time.perf_counter() - start, 3)


@contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """Folder beside the output for the trainer's checkpoints; removed when it stays empty."""
    folder = target.with_name(f"{target.name}.checkpoints")
    try:
        yield folder
    finally:
        if is_main() and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
