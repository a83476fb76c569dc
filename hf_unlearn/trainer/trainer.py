"""`UnlearningTrainer`: a Trainer whose loss forgets and whose optimizer steps obey a constraint."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction, IntervalStrategy, PredictionOutput, TrainOutput

from hf_unlearn.constraints.step_constrainer import EngineOptimizer, StepConstrainer
from hf_unlearn.core.sharding import check_sharding, shard_on_cpu, sharding_of
from hf_unlearn.data.encoding import encode_dataset
from hf_unlearn.data.formats import Rows
from hf_unlearn.data.left_out import cut_records
from hf_unlearn.data.pairs import PairedDataset, attackers_rows
from hf_unlearn.errors import ModelError, NonFiniteLossError, SettingsError
from hf_unlearn.evaluation.content import score_content_predictions
from hf_unlearn.evaluation.report import UnlearningReport
from hf_unlearn.evaluation.row_scores import RowScores, score_predictions
from hf_unlearn.losses import UnlearningLoss
from hf_unlearn.losses.registry import ForgetTerm
from hf_unlearn.models.arguments import taken_inputs
from hf_unlearn.models.forward import Predictions, predict
from hf_unlearn.models.modes import hold_norm_statistics
from hf_unlearn.models.tasks import Batch, Collator, ProcessingClass
from hf_unlearn.trainer.adversary import relearned_weights
from hf_unlearn.trainer.callbacks import DualWeightCallback, EngineCallback, StartLineCallback
from hf_unlearn.trainer.checkpoints import CheckpointKeeper, ResumePoint
from hf_unlearn.trainer.config import UnlearningConfig
from hf_unlearn.trainer.hub import HubPublisher, push_options, repository_name
from hf_unlearn.trainer.inputs import (
    StatisticsLike,
    check_best_metric,
    original_source,
    prepare_inputs,
    refuse_other_arguments,
    unlearning_config,
)
from hf_unlearn.trainer.outcome import UnlearningOutcome, outcome_of, say
from hf_unlearn.trainer.progress import use_step_lines
from hf_unlearn.trainer.reference import take_reference
from hf_unlearn.trainer.row_stopping import RowStopping
from hf_unlearn.trainer.run_record import fill_missing, run_report
from hf_unlearn.trainer.stopping import OverUnlearningCallback, stopping_rules

if TYPE_CHECKING:
    from peft import PeftConfig


class UnlearningTrainer(Trainer):
    """Make a model forget `forget_dataset` under the constraint of `args`; otherwise as `transformers.Trainer`.

    Args:
        model: A model with a head, or the folder or Hub id of one (loaded as float32).
        args: An `UnlearningConfig`.
        forget_dataset: Rows to forget, in a format of `data.encode_dataset`.
        retain_dataset: Rows to keep, if available: for the retain term of the loss, and to collect statistics if no
            `statistics` are given.
        statistics: Statistics of the retain rows on this model: the object, a folder or a Hub id.
        holdout_dataset: Rows like the forget rows that the model never saw: training stops when forget rows look like
            them (`OverUnlearningCallback`), measured at each evaluation.
        rehearsal_dataset: Rows that the model never saw, for a retain term that holds the model to the original's
            predictions (`retain="kl"`), besides `retain_dataset`. By default, every second held-out row: it is not a
            row to judge by then.
        eval_dataset: More splits by name, evaluated as in Trainer.
        data_collator: Collates plain rows to a batch; the default pads on the right.
        processing_class: Tokenizer or image processor; loaded with `model` if that is a name.
        peft_config: Train a LoRA adapter with this configuration instead of the weights; the constraint holds for the
            merged weights. `model` may also have an untrained adapter already.
        loss: Your own loss, in place of `args.loss`: a forget term `(predictions, original) -> values` (see
            `losses.registry.LossKind`), or what `losses.build_loss` returns.
        original_model: A frozen copy for losses that read the original model. By default no copy is needed: its outputs
            come from `args.original_logprobs`, or the original weights are put into the model temporarily (an adapter
            is disabled).
        reference_model: The checkpoint before the model was fine-tuned on the forget rows, for losses with a target
            (`to_reference`): a model, folder or Hub id; default: `args.reference_model`. It predicts the forget rows
            once, before training; its predictions are stored on disk. Without one, the model itself predicts each token
            of an answer from the last two before it.
        extra_metrics: More metrics of the model at each evaluation: a function `model -> {name: value}` such as
            `evaluation.training_metrics` returns.
        callbacks: As in Trainer.
        optimizers: As in Trainer.
        compute_metrics: As in Trainer; by default evaluations report mean loss, probability, accuracy and entropy.
            Stopping always uses these.
        other_trainers: None; an argument of another trainer, such as `train_dataset`, is an error that names its
            counterpart.

    Attributes:
        constrainer: The `StepConstrainer`: drift, leak, original weights.
        coverage: Which parameters are protected, frozen and exposed.
        loss: The loss with its settings.
        rows_rehearsed: Number of rows that the retain term reads besides `retain_dataset`.
        row_counts: For each set its number of `rows`, and of `rows_cut` and `tokens_cut` at `args.max_length`.

    Raises:
        SettingsError: There is a constraint but no statistics and no retain rows to collect them from, or
            `eval_dataset` has no names.
        DataError: No forget rows, a forget row without labels, forget rows that are also in the retain or the held-out
            set, or forget rows without the alternate answers that the loss needs.
        StatisticsError: The statistics belong to another model.
        CoverageError: A parameter would train unprotected.

    Example:

    >>> import tempfile, torch, transformers
    >>> from hf_unlearn.trainer.config import UnlearningConfig
    >>> _ = torch.manual_seed(0)
    >>> sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **sizes))
    >>> forget = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]
    >>> retain = [{"input_ids": [8, 9, 10], "labels": [-100, 9, 10]}]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     args = UnlearningConfig(folder, max_steps=1, disable_tqdm=True, use_cpu=True)
    ...     trainer = UnlearningTrainer(model, args, forget, retain)
    ...     _ = trainer.train()
    >>> trainer.stop_reason
    'all 1 steps were made'
    """

    # Construction

    def __init__(
        self,
        model: str | os.PathLike | nn.Module,
        args: UnlearningConfig | None = None,
        forget_dataset: "Rows | None" = None,
        retain_dataset: "Rows | None" = None,
        *,
        statistics: "StatisticsLike | None" = None,
        holdout_dataset: "Rows | None" = None,
        rehearsal_dataset: "Rows | None" = None,
        eval_dataset: "Mapping[str, Rows] | None" = None,
        data_collator: Collator | None = None,
        processing_class: "ProcessingClass | None" = None,
        peft_config: "PeftConfig | None" = None,
        loss: str | ForgetTerm | UnlearningLoss | None = None,
        original_model: nn.Module | None = None,
        reference_model: str | os.PathLike | nn.Module | None = None,
        extra_metrics: Callable[[nn.Module], Mapping[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        **other_trainers: object,
    ):
        refuse_other_arguments(other_trainers)
        args = unlearning_config(args)
        inputs = prepare_inputs(
            model,
            args,
            forget_dataset,
            retain_dataset,
            statistics=statistics,
            holdout_dataset=holdout_dataset,
            rehearsal_dataset=rehearsal_dataset,
            eval_dataset=eval_dataset,
            data_collator=data_collator,
            processing_class=processing_class,
            peft_config=peft_config,
            loss=loss,
        )
        check_best_metric(args, inputs.splits, others=extra_metrics is not None or compute_metrics is not None)
        if not inputs.splits:
            args.eval_strategy = IntervalStrategy.NO
        super().__init__(
            model=inputs.model,
            args=args,
            data_collator=inputs.paired_collator(attacker=args.adversary_steps > 0),
            train_dataset=inputs.training_pairs(args.seed),
            eval_dataset=inputs.splits or None,
            processing_class=inputs.processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            compute_metrics=compute_metrics or _mean_scores,
        )
        metrics = _mean_scores if compute_metrics is None else partial(_own_metrics, compute_metrics)
        self.compute_metrics: Callable[[EvalPrediction], dict[str, float]] = metrics
        self.loss_is_scaled_for_ga = True  # by the counts of get_batch_samples
        self.loss, self.coverage, self.extra_metrics = inputs.loss, inputs.coverage, extra_metrics
        self.constrainer = StepConstrainer(
            self.model, inputs.statistics, inputs.constraint, relative_step=args.relative_step
        )
        self._original = original_source(
            inputs, args, self.constrainer, copy=original_model, scope=self.compute_loss_context_manager
        )
        self._reference = take_reference(inputs, args, reference_model, self.compute_loss_context_manager)
        self._checkpoints = CheckpointKeeper(args, inputs.loss, self.constrainer, sharding_of(self.accelerator))
        self._publisher = HubPublisher(args, self.model, lambda folder: self.save_model(folder, _internal_call=True))
        self._scores_rows = compute_metrics is None
        self._constrained_optimizer: torch.optim.Optimizer | EngineOptimizer | None = None
        self._loss_since_step: Tensor | float = 0.0
        self._batch_counts = True  # false if a micro-batch has no row to push
        self._earlier_stop_reason: str | None = None  # of a run that had ended and was resumed
        self.rows_rehearsed = (
            0 if inputs.rehearsal is None or not inputs.loss.has_retain_term else len(inputs.rehearsal)
        )
        self._stopping_rows = {
            "forget": inputs.forget if self._reference is None else self._reference.forget,
            "holdout": inputs.holdout,
            "retain": inputs.splits.get("retain"),
        }
        self.row_counts = cut_records(
            {"forget": inputs.forget, "retain": inputs.retain, "holdout": inputs.holdout, **inputs.splits}
        )
        if isinstance(self.eval_dataset, dict) and "forget" in self.eval_dataset:
            self.eval_dataset["forget"] = self._stopping_rows["forget"]
        self._outcome: UnlearningOutcome | None = None
        use_step_lines(self.callback_handler, list(inputs.splits))
        self._add_callbacks()

    def create_accelerator_and_postprocess(self) -> None:
        """Create the accelerator as Trainer does, with FSDP on CPUs too; refuse sharding that is not supported.

        accelerate shards on accelerators only, and silently runs data parallel on CPUs.

        Raises:
            SettingsError: The constraint could not be kept with this sharding.
        """
        super().create_accelerator_and_postprocess()
        shard_on_cpu(self.accelerator, self.args.fsdp_plugin_args)
        self.is_fsdp_enabled = getattr(self.accelerator.state, "fsdp_plugin", None) is not None
        check_sharding(self.accelerator, self.model)
        if self.args.adversary_steps and self.is_sharded:
            raise SettingsError("adversary_steps needs whole weights on each process (DDP); they are sharded here")

    def _add_callbacks(self) -> None:
        if self.is_deepspeed_enabled:
            self.add_callback(EngineCallback(lambda: self._constrain_steps_of(self.model_wrapped)))
        rules = stopping_rules(
            self.args,
            self.constrainer,
            self._stopping_score,
            has_holdout=self._stopping_rows["holdout"] is not None,
            has_retain=self._stopping_rows["retain"] is not None,
            reference=self._reference,
            reads_metrics=self._scores_rows,
        )
        for rule in rules:
            self.add_callback(rule)
        self.add_callback(StartLineCallback(self._stopping_callback()))
        if self.loss.dual is not None:
            self.add_callback(DualWeightCallback(self.loss.dual))

    # Weights

    @contextmanager
    def original_model(self) -> Iterator[nn.Module]:
        """Give the model its original weights within the context."""
        with self.constrainer.original():
            yield self.model

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds only a part of the (master) weights."""
        return sharding_of(self.accelerator) != "none"

    def whole_state_dict(self) -> dict[str, Tensor] | None:
        """Gather sharded weights on process 0 (a collective call); None if they are not sharded."""
        return self.accelerator.get_state_dict(self.model_wrapped) if self.is_sharded else None

    # Optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer of `args.optim`, with the constraint's step hooks."""
        if self.args.optim == "sgd":  # TrainingArguments has no setting for its momentum
            self.optimizer_cls_and_kwargs: tuple[type[torch.optim.Optimizer], dict[str, Any]] = (
                torch.optim.SGD,
                {"lr": self.args.learning_rate, "momentum": self.args.momentum},
            )
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        if not self.is_deepspeed_enabled:  # its engine does not exist yet
            self._constrain_steps_of(getattr(optimizer, "optimizer", optimizer))
        return optimizer

    def _constrain_steps_of(self, optimizer: "torch.optim.Optimizer | EngineOptimizer") -> None:
        """Attach the constraint to an optimizer or DeepSpeed engine; once, though each `train()` calls this."""
        if optimizer is not self._constrained_optimizer:
            self.constrainer.attach(optimizer)
            self._constrained_optimizer = optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Create the scheduler as Trainer does; with `final_learning_rate` an exponential one, as in PGU."""
        final = self.args.final_learning_rate
        if final is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        ratio = final / self.args.learning_rate
        self.lr_scheduler: torch.optim.lr_scheduler.LRScheduler | None = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda step: ratio ** (step / num_training_steps)
        )
        return self.lr_scheduler

    # Step

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], dict[str, int]]:
        """Return the micro-batches of an optimizer step, and the number of units of each loss term in all of them."""
        assert isinstance(self.train_dataset, PairedDataset)
        self.train_dataset.set_epoch(int(self.state.epoch or 0))  # Trainer does not while it skips batches on resuming
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [self.loss.counts(self.model, batch) for batch in batches]
        total = {term: sum(count[term] for count in counts) for term in (counts[0] if counts else ())}
        if self.args.world_size > 1:
            summed = self.accelerator.reduce(torch.tensor(list(total.values()), device=device))
            total = dict(zip(total, summed.tolist(), strict=True))
        return batches, total

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Mapping[str, int] | None = None
    ) -> Tensor:
        """Make the forward and backward pass of a micro-batch, and constrain the gradient before it is clipped.

        Against an attacker the gradient is taken at relearned weights. With row stopping, rows that have reached the
        mark are left out, and very improbable ones are pulled up.
        """
        self.constrainer.measure_leak = (self.state.global_step + 1) % max(self.state.logging_steps or 1, 1) == 0
        inputs = self._prepare_inputs(inputs)
        attackers_batch = inputs.pop("relearn", None)
        row_stopping, ends_step = self._row_stopping, self.accelerator.sync_gradients
        if row_stopping is not None:
            for batch in (inputs["forget"], attackers_batch):
                if batch is not None:
                    row_stopping.accumulate_pull(self.model, batch)
        with self._relearned_weights(attackers_batch):
            if row_stopping is not None:
                inputs, self._batch_counts = row_stopping.select_pushed(model, inputs)
                if ends_step:
                    row_stopping.decide_whether_to_move()
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._loss_since_step += loss.detach()
        if ends_step:
            self._check_finite()
            if row_stopping is not None:
                row_stopping.add_pull()
            if self.args.max_grad_norm and not self.is_deepspeed_enabled:  # DeepSpeed steps in its backward pass
                self.constrainer.constrain_gradients()
        return loss

    @property
    def _row_stopping(self) -> RowStopping | None:
        stopping = self._stopping_callback()
        return stopping.row_stopping if stopping is not None else None

    def _relearned_weights(self, batch: Batch | None) -> AbstractContextManager[None]:
        """Give the model the weights of an attacker who relearns `batch`; for None, leave the weights as they are."""
        if batch is None:
            return nullcontext()
        args = self.args
        return relearned_weights(
            self.model, self.constrainer, batch, args.adversary_steps, args.adversary_learning_rate
        )

    def _check_finite(self) -> None:
        """Raise, on all processes at once, if a loss since the last step was not finite on one of them."""
        loss = self.accelerator.reduce(self._loss_since_step).item()
        self._loss_since_step = 0.0
        if math.isfinite(loss):
            return
        stopping = self._stopping_callback()
        kept = stopping.last_short if stopping is not None else None
        self.constrainer.restore(kept.weights if kept is not None else None)
        which = f"those of step {kept.step}" if kept is not None else "the original ones"
        raise NonFiniteLossError(
            f"the loss is {loss} after step {self.state.global_step}; the weights are back to {which}: "
            "lower learning_rate, or choose a bounded loss such as ce_u or npo"
        )

    # Loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Mapping[str, int] | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Return the unlearning loss of a pair of batches, or the model's own loss of a plain batch (evaluation)."""
        if "forget" not in inputs:
            return super().compute_loss(model, taken_inputs(model, inputs), return_outputs, None)
        hold_norm_statistics(model)
        reference = None if self._reference is None else self._reference.predictions
        loss = self.loss(model, inputs, self._original, num_items_in_batch, reference)
        # gradients are averaged over processes, but counts are sums; a batch that does not count still makes its
        # backward pass, for which the other processes wait
        return loss * (self.accelerator.num_processes if self._batch_counts else 0)

    # Evaluation

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return scores of each row in place of logits: few numbers to gather, whatever the vocabulary."""
        if not self._scores_rows:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            predictions = predict(model, inputs)
            scores_BS = torch.cat([score_predictions(predictions), _content_scores(predictions)], dim=1)
        return scores_BS[:, 0].mean(), scores_BS, scores_BS[:, 0]

    def evaluate(
        self,
        eval_dataset: "Rows | Mapping[str, Rows] | None" = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Evaluate as Trainer does, and add the metrics of `extra_metrics` to those of the splits.

        `eval_dataset` may have raw rows, as those of the trainer, or be the name of a split.

        Raises:
            DataError: Rows that cannot be encoded.
            SettingsError: There is nothing to evaluate on, or no split of this name.
        """
        if eval_dataset is None and not self.eval_dataset:
            raise SettingsError("there are no rows to evaluate on; pass eval_dataset, here or to the trainer")
        if isinstance(eval_dataset, Mapping):
            eval_dataset = {name: self._encoded(rows, str(name)) for name, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self._encoded(eval_dataset, "evaluation")
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.extra_metrics is not None and eval_dataset is None:
            more = {f"{metric_key_prefix}_{name}": value for name, value in self.extra_metrics(self.model).items()}
            self.log(more)
            metrics |= more
        return metrics

    def predict(
        self, test_dataset: "Rows", ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Return the scores of each row as `predictions` (`evaluation.RowScores`), and their metrics; rows may be raw.

        With an own `compute_metrics` the predictions are the model's, as in Trainer.

        Raises:
            DataError: Rows that cannot be encoded.
            SettingsError: No split of this name.
        """
        return super().predict(self._encoded(test_dataset, "test"), ignore_keys, metric_key_prefix)

    def _encoded(self, rows: "Rows | str", what: str) -> "Rows":
        """Return rows as the model takes them; rows that are encoded already, as they are; a split, by its name."""
        if not isinstance(rows, str):
            return encode_dataset(
                rows, self.processing_class, what=what, max_length=self.args.max_length, model=self.model
            )
        splits = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        if rows not in splits:
            raise SettingsError(f"there is no evaluation split {rows!r}; there are {', '.join(splits) or 'none'}")
        return splits[rows]

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as Trainer does; against an attacker, forget rows are also scored after relearning."""
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        if self.args.adversary_steps and metric_key_prefix == "eval_forget" and self._stopping_callback() is not None:
            output.metrics[f"eval_forget_relearned_{self.args.stopping_metric}"] = self._stopping_score("forget")
        return output

    def set_stopping_rows(self, forget_dataset: "Rows", mark: float | None = None) -> None:
        """Let early stopping look at these forget rows only, and stop at a mark that was measured before.

        For a request in a series: training may include rows of earlier requests, which the stopping rule must ignore.

        Args:
            forget_dataset: Rows, in a format of `data.encode_dataset`; also evaluated as the split `forget`.
            mark: Value of the forget metric; by default it is measured on held-out rows. `args.forget_target` takes
                precedence.
        """
        rows: Rows = encode_dataset(
            forget_dataset, self.processing_class, what="forget", max_length=self.args.max_length, model=self.model
        )
        self._stopping_rows["forget"] = rows = rows if self._reference is None else self._reference.marked(rows)
        if isinstance(self.eval_dataset, dict) and "forget" in self.eval_dataset:
            self.eval_dataset["forget"] = rows
        stopping = self._stopping_callback()
        if stopping is not None and stopping.target is None and mark is not None:
            stopping.mark = mark

    def _stopping_score(self, split: str, metric: str | None = None, attacked: bool = True) -> float:
        """Return a metric, by default the forget metric, of `forget`, `holdout` or `retain` rows; no log line."""
        return self._stopping_metrics(split, attacked)[f"eval_{metric or self.args.stopping_metric}"]

    def _stopping_metrics(self, split: str, attacked: bool = True) -> dict[str, float]:
        """Return the metrics of a split, by their names in evaluations of one data set.

        Against an attacker a third of the forget rows, at most a training batch, is relearned, and the others are
        scored, unless `attacked` is false.
        """
        rows, batch = self._stopping_rows[split], None
        assert rows is not None
        if self.args.adversary_steps and split == "forget" and attacked:
            few, rows = attackers_rows(rows)
            batch = self._prepare_inputs(self.data_collator(few[: self.args.per_device_train_batch_size]))
        with self._relearned_weights(batch), self._own_scores():
            loop = self.evaluation_loop(self.get_eval_dataloader(rows), f"Comparing {split}")
        return loop.metrics

    @contextmanager
    def _own_scores(self) -> Iterator[None]:
        """Compute the package's metrics within the context, also for a trainer with its own `compute_metrics`."""
        theirs = self.compute_metrics, self._scores_rows
        self.compute_metrics, self._scores_rows = _mean_scores, True
        try:
            yield
        finally:
            self.compute_metrics, self._scores_rows = theirs

    def _stopping_callback(self) -> OverUnlearningCallback | None:
        callbacks = self.callback_handler.callbacks
        return next((callback for callback in callbacks if isinstance(callback, OverUnlearningCallback)), None)

    def _determine_best_metric(self, metrics: dict[str, float], trial: object) -> bool:
        """Choose the best checkpoint as Trainer does, among those whose evaluation meets `utility_floor`."""
        for name, floor in (self.args.utility_floor or {}).items():
            key = f"eval_{name.removeprefix('eval_')}"
            if key not in metrics:
                raise SettingsError(f"utility_floor names {name!r}; an evaluation has {', '.join(sorted(metrics))}")
            if not metrics[key] >= floor:
                return False
        followed = self.args.metric_for_best_model
        if followed is not None and f"eval_{followed.removeprefix('eval_')}" not in metrics:
            raise SettingsError(
                f"metric_for_best_model is {followed!r}; an evaluation has {', '.join(sorted(metrics))}"
            )
        return super()._determine_best_metric(metrics, trial)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add predicted retain drift and leak to the training log lines."""
        if "loss" in logs:
            drift = self.constrainer.drift()
            logs["retain_drift"] = drift.relative
            if drift.kl is not None:
                logs["retain_kl"] = drift.kl
            if self.constrainer.leak is not None:
                logs["leak"] = self.constrainer.leak
            if self.loss.dual is not None:
                logs["retain_weight"] = self.loss.dual.value
        super().log(logs, start_time)

    # Checkpoints

    def train(self, resume_from_checkpoint: str | bool | None = None, **options: Any) -> TrainOutput:
        """Train as Trainer does; True resumes from the newest complete checkpoint of `output_dir`, or starts.

        Create the trainer as for the first start, with the original model. The result is the same, to the bit, as
        without the interruption.

        Raises:
            SettingsError: The checkpoint is incomplete, or of a run with other statistics, settings or processes.
            NonFiniteLossError: The loss became NaN or infinite; the last good weights are restored.
        """
        stopping, dual = self._stopping_callback(), self.loss.dual
        if stopping is not None:
            stopping.last_short = None
        if dual is not None:
            dual.reset()
        self._earlier_stop_reason = None
        point = self._checkpoints.find(resume_from_checkpoint)
        if point is not None and self._has_ended(point):
            output = self._load_ended_run(point)
        else:
            if point is not None and stopping is not None:
                stopping.last_short = point.last_short
            if point is not None and dual is not None and point.dual_weight is not None:
                dual.load_state(point.dual_weight)
            output = super().train(resume_from_checkpoint=None if point is None else str(point.folder), **options)
        self._outcome = self._measured_outcome()
        if self._outcome.mark is not None:
            say(str(self._outcome))
        return output

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        """Make the steps of an epoch as Trainer does; none if the forget rows had reached the mark before."""
        stopping = self._stopping_callback()
        if stopping is not None and stopping.nothing_to_forget:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **options)

    def _measured_outcome(self) -> UnlearningOutcome:
        """Measure the forget rows under the current weights, and compare them with the mark; a collective call."""
        stopping, value, function_loss = self._stopping_callback(), None, None
        if stopping is not None:
            stopping.measure_mark()  # not yet known if a run that had ended was loaded
            stopping.measure_before()
            value = stopping.before
            if not stopping.nothing_to_forget:
                metrics = self._stopping_metrics("forget")
                value = metrics[f"eval_{self.args.stopping_metric}"]
                function_loss = metrics.get("eval_function_loss")
        rules = [callback for callback in self.callback_handler.callbacks if getattr(callback, "reason", None)]
        budgets = [rule.setting for rule in rules if hasattr(rule, "setting")]
        moved = self.constrainer.has_moved()
        return outcome_of(
            stopping,
            value,
            steps=self.state.global_step,
            moved=moved,
            budgets=budgets,
            function_loss=function_loss,
        )

    @property
    def outcome(self) -> UnlearningOutcome | None:
        """Whether the last run reached its mark, and what to try next; None before the first run."""
        return self._outcome

    def _has_ended(self, point: ResumePoint) -> bool:
        """Return whether nothing is left to train; a run that had made all its steps goes on if it now has more."""
        if point.stop_reason is None:
            return False
        if not point.made_all_steps:
            return True
        made = TrainerState.load_from_json(str(point.folder / TRAINER_STATE_NAME)).global_step
        return made >= self.set_initial_training_values(self.args, self.get_train_dataloader())[-1]

    def _load_ended_run(self, point: ResumePoint) -> TrainOutput:
        """Load the checkpoint of a run that had ended; there is nothing left to train."""
        if self.is_sharded:  # such a checkpoint is loaded into a model that is sharded already
            self._prepare_for_training(self.args.max_steps, self.get_train_dataloader(), str(point.folder))
        else:
            self._load_from_checkpoint(str(point.folder))
        if self.is_deepspeed_enabled:
            self._constrain_steps_of(self.model_wrapped)
        self.state = TrainerState.load_from_json(str(point.folder / TRAINER_STATE_NAME))
        self._earlier_stop_reason = point.stop_reason
        return TrainOutput(self.state.global_step, 0.0, {})

    @property
    def stop_reason(self) -> str:
        """Why the last run ended, in words."""
        if self._earlier_stop_reason is not None:
            return self._earlier_stop_reason
        reasons = [reason for cb in self.callback_handler.callbacks if (reason := getattr(cb, "reason", None))]
        if reasons:
            return "; ".join(reasons)
        stopping = self._stopping_callback()
        if stopping is not None and stopping.nothing_to_forget:
            return "the forget rows had reached the mark before the first step; no step was made"
        return f"all {self.state.max_steps} steps were made"

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        """Save as Trainer does, then seal the folder; older checkpoints are removed only after that."""
        with self._checkpoints.without_rotation():
            super()._save_checkpoint(model, trial)
        ended = self.control.should_training_stop
        ruled = any(getattr(callback, "reason", None) for callback in self.callback_handler.callbacks)
        reason = self.stop_reason if ended else None
        self._checkpoints.seal(self.state, reason, self._stopping_callback(), made_all_steps=ended and not ruled)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Save as Trainer does, but the arguments as JSON without tokens in place of a pickle with them."""
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        (folder / "training_args.bin").unlink(missing_ok=True)
        if self.args.should_save:
            content = {k: v for k, v in self.args.to_dict().items() if not k.endswith("token")}
            (folder / "training_args.json").write_text(json.dumps(content, indent=2, default=str), encoding="utf-8")

    # Hub

    def report(self) -> UnlearningReport:
        """Return a report of this run; its `metrics` are empty until you set those of `evaluate_unlearning`."""
        return run_report(self)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Choose the name of the repository; the first push creates it."""
        self.hub_model_id: str | None = repository_name(self.args)
        self.push_in_progress = None

    def push_to_hub(
        self,
        commit_message: str | None = "Unlearned model",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        *,
        report: UnlearningReport | None = None,
        update: bool = False,
        publish_samples: bool = False,
    ) -> CommitInfo | None:
        """Write model, report, card and plots to the folder `hub` of `output_dir`, and publish that folder.

        Args:
            commit_message: First line of the commit.
            blocking: Only True: what was published is verified.
            token: Write token; default: `args.hub_token`, `HF_TOKEN` or the token of `hf auth login`.
            revision: Branch; default: `args.hub_revision` or `main`.
            private: Visibility of a repository that the push creates; default: `args.hub_private_repo`.
            report: The finished report, such as that of `evaluate_unlearning`; its empty fields are filled from this
                run. Default: a report of this run, with nothing measured.
            update: Also push into a repository that has other files; with `push_unfinished` this is always so.
            publish_samples: As in `push_unlearned_model`.

        Returns:
            The commit; None on processes other than the first.

        Raises:
            PushError: See `push_unlearned_model`.
            SettingsError: See `push_unlearned_model`.
        """
        if not blocking:
            raise SettingsError("push_to_hub verifies what was published and so has to wait; pass blocking=True")
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        run = self.report()
        folder = self._publisher.write_finished(run if report is None else fill_missing(report, run))
        if not self.is_world_process_zero():
            return None
        if getattr(self, "hub_model_id", None) is None:
            self.init_hf_repo()
        assert self.hub_model_id is not None
        options = push_options(
            self.args, private=private, token=token, revision=revision, commit_message=commit_message, update=update
        )
        return self._publisher.push(folder, self.hub_model_id, options, publish_samples=publish_samples)

    def create_model_card(self, *args: object, **options: object) -> None:
        """Write the card of this run to `output_dir`, unless there is a card already."""
        report = self.report()  # a collective call: every process takes part in measuring the drift
        if self.is_world_process_zero():
            self._publisher.write_missing_card(report)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Publish nothing, unless both `hub_strategy` and `push_unfinished` ask for it."""
        if self.args.push_unfinished and self.args.hub_strategy != "end":
            self.push_to_hub(f"Unfinished: step {self.state.global_step}")


def _own_metrics(
    compute_metrics: Callable[[EvalPrediction], dict[str, float]], prediction: EvalPrediction
) -> dict[str, float]:
    """Return what the user's function returns; raise `SettingsError` if it is not a mapping, which Trainer fills."""
    metrics = compute_metrics(prediction)
    if not isinstance(metrics, Mapping):
        raise SettingsError(f"compute_metrics returned {metrics!r:.60}; return a dict of numbers by name")
    return dict(metrics)


def _content_scores(predictions: Predictions) -> Tensor:
    """Return the loss on content and on function tokens of each row, `[B, 2]`; NaN for rows without a mask."""
    if predictions.content_L is None:
        return torch.full((predictions.n_rows, 2), torch.nan, dtype=torch.float64, device=predictions.labels_L.device)
    return score_content_predictions(predictions)[:, :2]


def _mean_scores(prediction: EvalPrediction) -> dict[str, float]:
    """Average what `prediction_step` returns over the rows of all processes; raise `ModelError` on NaN logits."""
    matrix_NS = np.asarray(prediction.predictions)
    scores = RowScores.from_matrix(matrix_NS)
    if (broken := np.isnan(scores.loss)).any():
        raise ModelError(
            f"the model's logits are NaN on row {broken.argmax()} of {len(broken)}; its weights are broken: go back to "
            "an earlier checkpoint, with a lower learning_rate"
        )
    content = zip(("content_loss", "function_loss"), matrix_NS[:, -2:].T, strict=True)
    return {
        "loss": scores.loss.mean(),
        "probability": scores.probability.mean(),
        "accuracy": scores.accuracy.mean(),
        "entropy": scores.entropy.mean(),
    } | {name: float(np.nanmean(values_N)) for name, values_N in content if not np.isnan(values_N).all()}
