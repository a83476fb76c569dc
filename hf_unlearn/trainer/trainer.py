"""`UnlearningTrainer`: a Trainer whose loss forgets and whose optimizer steps obey a constraint."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import (
    EvalLoopOutput,
    EvalPrediction,
    IntervalStrategy,
)

from hf_unlearn.constraints.step_constrainer import StepConstrainer
from hf_unlearn.core.sharding import check_sharding, shard_on_cpu
from hf_unlearn.data.batches import default_collator
from hf_unlearn.data.checks import require_alternates, require_disjoint, require_labels
from hf_unlearn.data.encoding import encode_dataset
from hf_unlearn.data.pairs import PairedCollator, PairedDataset, attackers_rows
from hf_unlearn.errors import ModelError, NonFiniteLossError, SettingsError
from hf_unlearn.evaluation.row_scores import RowScores, score_predictions
from hf_unlearn.losses import UnlearningLoss, build_loss
from hf_unlearn.losses.original_outputs import frozen_copy, original_outputs
from hf_unlearn.losses.registry import ForgetTerm, OriginalModel
from hf_unlearn.models.adapters import with_adapter
from hf_unlearn.models.forward import predict
from hf_unlearn.models.loading import load_named
from hf_unlearn.models.modes import hold_norm_statistics
from hf_unlearn.statistics.retain_statistics import RetainStatistics
from hf_unlearn.trainer.adversary import relearned
from hf_unlearn.trainer.callbacks import DualWeightCallback, EngineCallback
from hf_unlearn.trainer.checkpoints import ResumeMixin
from hf_unlearn.trainer.config import UnlearningConfig
from hf_unlearn.trainer.hub import HubMixin
from hf_unlearn.trainer.inputs import encode_splits, encoder, freeze_for_run, usable_statistics
from hf_unlearn.trainer.stopping import DriftBudgetCallback, OverUnlearningCallback, RetainDropCallback


class UnlearningTrainer(ResumeMixin, HubMixin, Trainer):
    """Forget `forget_dataset` under the constraint of `args`, the rest as in `transformers.Trainer`.

    Args:
        model: A model with a head, or the folder or Hub id of one (loaded as float32).
        args: An `UnlearningConfig`.
        forget_dataset: Rows to forget, in a format of `data.encode_dataset`.
        retain_dataset: Rows to keep, if any are at hand: for the loss's retain term and, where no `statistics` are
            given, to collect them.
        statistics: Statistics of the retain rows on this model, as object, folder or Hub id.
        holdout_dataset: Rows like the forget rows that were never seen: training stops where forget rows look like
            them (`OverUnlearningCallback`), judged at each evaluation.
        eval_dataset: Further splits by name, evaluated as in Trainer.
        data_collator: Plain rows to a batch; default pads on the right.
        processing_class: Tokenizer or image processor; loaded with `model` where that is a name.
        peft_config: Train a LoRA adapter of this configuration instead of the weights; the constraint holds for the
            merged weights. `model` may also have an untrained adapter already.
        loss: A loss of your own, in place of `args.loss`: a forget term `(predictions, original) -> values` (see
            `losses.LossKind`) or what `losses.build_loss` gives.
        original_model: A frozen copy for losses that read the original model; default: its weights, or the model
            without its adapter, put in for the moment (no copy), or `args.original_logprobs`.
        extra_metrics: Further metrics of the model at each evaluation, such as `evaluation.training_metrics` gives.
        callbacks, optimizers, compute_metrics: As in Trainer.

    Attributes:
        constrainer: The `StepConstrainer`: drift, leak, original weights.
        coverage: Which parameters are protected, frozen and exposed.

    Raises:
        SettingsError: A constraint without statistics and without retain rows to collect them from, or an
            `eval_dataset` without names.
        DataError: No forget rows or one without labels, forget rows that are also in the retain or the held-out set,
            or alternate answers that the loss needs and the rows have not.
        StatisticsError: Statistics of another model.
        CoverageError: A parameter that would train unprotected.
    """

    def __init__(
        self,
        model: str | os.PathLike | nn.Module,
        args: UnlearningConfig,
        forget_dataset: Any,
        retain_dataset: Any = None,
        *,
        statistics: RetainStatistics | str | os.PathLike | None = None,
        holdout_dataset: Any = None,
        eval_dataset: Mapping[str, Any] | Any = None,
        data_collator: Callable | None = None,
        processing_class: Any = None,
        peft_config: Any = None,
        loss: str | ForgetTerm | UnlearningLoss | None = None,
        original_model: nn.Module | None = None,
        extra_metrics: Callable[[nn.Module], Mapping[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
    ):
        if not isinstance(model, nn.Module):
            model, processing_class = load_named(model, processing_class)
        assert isinstance(model, nn.Module)
        self.loss = args.build_loss() if loss is None else build_loss(loss)
        encode = encoder(model, processing_class, args, self.loss)
        forget, retain = encode(forget_dataset, "forget"), encode(retain_dataset, "retain")
        holdout = encode(holdout_dataset, "holdout")
        for other, what in ((retain, "retain"), (holdout, "holdout")):
            if other is not None:
                require_disjoint(forget, other, what)
        self.loss.check_labels(tokens=require_labels(forget, "forget"))
        if self.loss.kind.alternate_answer:
            require_alternates(forget, self.loss.name)
        collator = data_collator or default_collator(processing_class)
        self.extra_metrics = extra_metrics
        if self.loss.kind.needs_retain and retain is None:
            raise SettingsError(
                f"loss {self.loss.name!r} needs retain rows; pass retain_dataset or choose another loss"
            )
        constraint = args.build_constraint()
        statistics = usable_statistics(model, statistics, retain, collator, args)
        if peft_config is not None:
            set_seed(args.seed)  # a resumed run starts from the same A
            model = with_adapter(model, peft_config)
        self.coverage = freeze_for_run(model, statistics, constraint, args)
        splits = encode_splits(eval_dataset, encode)
        if holdout_dataset is not None or args.forget_target is not None:
            splits = {"forget": forget, **splits}
        if not splits:
            args.eval_strategy = IntervalStrategy.NO
        super().__init__(
            model=model,
            args=args,
            data_collator=PairedCollator(collator, attacker=args.adversary_steps > 0),
            train_dataset=PairedDataset(
                forget, retain if self.loss.has_retain_term else None, args.seed, bool(self.loss.kind.alternate_answer)
            ),
            eval_dataset=splits or None,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            compute_metrics=compute_metrics or _mean_scores,
        )
        self.loss_is_scaled_for_ga = True
        self._own_metrics = compute_metrics is None
        self._unfinished_loss: Any = 0.0
        self._pushes = True
        self._attached: Any = None
        self.constrainer = StepConstrainer(self.model, statistics, constraint, relative_step=args.relative_step)
        self._original = self._original_source(original_model, forget, retain, collator)
        self._stopping_rows = {"forget": forget, "holdout": holdout, "retain": splits.get("retain")}
        self._add_callbacks()

    def create_accelerator_and_postprocess(self) -> None:
        """As Trainer; FSDP also where there is no accelerator. Raises `SettingsError` on sharding that is not handled.

        accelerate shards on accelerators only and silently runs data parallel on CPUs instead.
        """
        super().create_accelerator_and_postprocess()
        shard_on_cpu(self.accelerator, self.args.fsdp_plugin_args)
        self.is_fsdp_enabled = getattr(self.accelerator.state, "fsdp_plugin", None) is not None
        check_sharding(self.accelerator, self.model)
        if self.args.adversary_steps and self.is_sharded:
            raise SettingsError("adversary_steps needs whole weights on each process (DDP); they are sharded here")

    @contextmanager
    def original_model(self) -> Iterator[nn.Module]:
        """The model with its original weights, for the duration of the context."""
        with self.constrainer.original():
            yield self.model

    def whole_state_dict(self) -> dict[str, Tensor] | None:
        """All weights, on process 0, where they are sharded (a collective call); None where the model has them all."""
        return self.accelerator.get_state_dict(self.model_wrapped) if self.is_sharded else None

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of `args.optim`, with the constraint's step hooks."""
        if self.args.optim == "sgd":  # TrainingArguments has no setting for its momentum
            self.optimizer_cls_and_kwargs: Any = (
                torch.optim.SGD,
                {"lr": self.args.learning_rate, "momentum": self.args.momentum},
            )
        optimizer = super().create_optimizer() if model is None else super().create_optimizer(model)
        if not self.is_deepspeed_enabled:  # its engine does not exist yet
            self._attach(getattr(optimizer, "optimizer", optimizer))
        return optimizer

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """As Trainer; with `final_learning_rate` the exponential from `learning_rate` to it (PGU's)."""
        final = self.args.final_learning_rate
        if final is None or self.lr_scheduler is not None:
            return super().create_scheduler(num_training_steps, optimizer)
        share = final / self.args.learning_rate
        self.lr_scheduler: Any = torch.optim.lr_scheduler.LambdaLR(
            optimizer or self.optimizer, lambda step: share ** (step / num_training_steps)
        )
        return self.lr_scheduler

    def _attach(self, optimizer: Any) -> None:
        if optimizer is not self._attached:  # called again by each train()
            self.constrainer.attach(optimizer)
            self._attached = optimizer

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Micro-batches of one optimizer step, and the number of units of each loss term in all of them."""
        assert isinstance(self.train_dataset, PairedDataset)
        self.train_dataset.set_epoch(int(self.state.epoch or 0))  # which skipping batches after a restart leaves out
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        counts = [self.loss.counts(self.model, batch) for batch in batches]
        total = {term: sum(count[term] for count in counts) for term in (counts[0] if counts else ())}
        if self.args.world_size > 1:
            summed = self.accelerator.reduce(torch.tensor(list(total.values()), device=device))
            total = dict(zip(total, summed.tolist(), strict=True))
        return batches, total

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Forward and backward pass; the gradient is constrained before it is clipped."""
        self.constrainer.measure_leak = (self.state.global_step + 1) % max(self.state.logging_steps or 1, 1) == 0
        inputs = self._prepare_inputs(inputs)
        attackers = inputs.pop("relearn", None)
        band = getattr(self._stopping_callback(), "band", None)
        if band is not None:
            for rows in (inputs["forget"], attackers):
                if rows is not None:
                    band.pull(self.model, rows)
        with self._relearned(attackers):
            if band is not None:
                inputs, self._pushes = band.to_push(model, inputs)
                if self.accelerator.sync_gradients:
                    band.end_step()
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._unfinished_loss += loss.detach()
        if self.accelerator.sync_gradients:
            self._check_finite()
            if band is not None:
                band.combine()
            if self.args.max_grad_norm and not self.is_deepspeed_enabled:  # its step was a part of the backward pass
                self.constrainer.constrain_gradients()
        return loss

    def _relearned(self, batch: Any) -> AbstractContextManager[None]:
        """The weights that an attacker who has these rows would come to; without any, those of the moment."""
        if batch is None:
            return nullcontext()
        args = self.args
        return relearned(self.model, self.constrainer, batch, args.adversary_steps, args.adversary_learning_rate)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The unlearning loss of a pair of batches; the model's own loss for a plain batch (evaluation)."""
        if "forget" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, None)
        hold_norm_statistics(model)
        loss = self.loss(model, inputs, self._original, num_items_in_batch)
        # gradients are averaged over processes, counts are sums; a pass of every process, whether it pushes or not
        return loss * (self.accelerator.num_processes if self._pushes else 0)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Scores of each row instead of logits: a few numbers to gather, whatever the vocabulary."""
        if not self._own_metrics:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            scores_B4 = score_predictions(predict(model, inputs))
        return scores_B4[:, 0].mean(), scores_B4, scores_B4[:, 0]

    def _original_source(self, copy: nn.Module | None, forget: Any, retain: Any, collator: Callable) -> OriginalModel:
        """Where the original model's predictions come from: a copy, the disk, or its weights put in for the moment."""
        folder = self.args.original_logprobs
        if copy is not None:
            if folder is not None or copy is self.model:
                raise SettingsError("original_model must be a copy of its own; pass either it or original_logprobs")
            return frozen_copy(copy.to(self.args.device))
        if folder is None or not self.loss.needs_original:
            return self.constrainer.original
        rows = {"forget": forget, "retain": retain}
        if self.loss.kind.alternate_answer:
            rows["alternate"] = [row["alternate"] for row in forget]
        stored = original_outputs(
            self.model, self.loss, rows, folder, collator=collator, batch_size=self.args.per_device_eval_batch_size,
            precision="bf16" if self.args.bf16 else "fp16" if self.args.fp16 else "fp32",
            scope=self.compute_loss_context_manager,
        )  # fmt: skip
        return lambda: nullcontext(stored)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As Trainer; the metrics of `extra_metrics` come with those of the splits."""
        metrics = super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        if self.extra_metrics is not None and eval_dataset is None:
            judged = {f"{metric_key_prefix}_{name}": value for name, value in self.extra_metrics(self.model).items()}
            self.log(judged)
            metrics |= judged
        return metrics

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **options: Any) -> EvalLoopOutput:
        """As Trainer; where an attacker is trained against, forget rows are judged after relearning as well."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **options)
        if self.args.adversary_steps and metric_key_prefix == "eval_forget" and self._stopping_callback() is not None:
            output.metrics[f"eval_forget_relearned_{self.args.forget_metric}"] = self._stopping_score("forget")
        return output

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As Trainer, among the evaluations that keep to `utility_floor`."""
        for name, floor in (self.args.utility_floor or {}).items():
            key = f"eval_{name.removeprefix('eval_')}"
            if key not in metrics:
                raise SettingsError(f"utility_floor names {name!r}; an evaluation has {', '.join(sorted(metrics))}")
            if not metrics[key] >= floor:
                return False
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

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As Trainer, but with the arguments as JSON without tokens instead of a pickle with them."""
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        (folder / "training_args.bin").unlink(missing_ok=True)
        if self.args.should_save:
            content = {k: v for k, v in self.args.to_dict().items() if not k.endswith("token")}
            (folder / "training_args.json").write_text(json.dumps(content, indent=2, default=str), encoding="utf-8")

    def _add_callbacks(self) -> None:
        args = self.args
        if self.is_deepspeed_enabled:
            self.add_callback(EngineCallback(lambda: self._attach(self.model_wrapped)))
        if self._stopping_rows["holdout"] is not None or args.forget_target is not None:
            self.add_callback(
                OverUnlearningCallback(
                    self.constrainer, args.forget_metric, self._stopping_score, args.forget_target,
                    relearned=args.adversary_steps > 0, by_row=args.row_stopping,
                )
            )  # fmt: skip
        if args.max_retain_drift is not None:
            if self.constrainer.statistics is None:
                raise SettingsError("max_retain_drift needs statistics; pass `statistics` or `retain_dataset`")
            self.add_callback(DriftBudgetCallback(self.constrainer, args.max_retain_drift))
        if args.max_retain_drop is not None:
            if self._stopping_rows["retain"] is None:
                raise SettingsError(
                    "max_retain_drop needs retain rows: a split `retain` in eval_dataset (--retain or --train)"
                )
            self.add_callback(
                RetainDropCallback(self.constrainer, args.forget_metric, self._stopping_score, args.max_retain_drop)
            )
        if self.loss.dual is not None:
            self.add_callback(DualWeightCallback(self.loss.dual))

    def stop_by(self, forget_dataset: Any, mark: float | None = None) -> None:
        """Let early stopping look at these forget rows alone, and go by a mark that was measured before."""
        rows = encode_dataset(
            forget_dataset, self.processing_class, what="forget", max_length=self.args.max_length, model=self.model
        )
        self._stopping_rows["forget"] = rows
        if isinstance(self.eval_dataset, dict) and "forget" in self.eval_dataset:
            self.eval_dataset["forget"] = rows
        stopping = self._stopping_callback()
        if stopping is not None and stopping.target is None and mark is not None:
            stopping.mark = mark

    def _stopping_score(self, split: str, metric: str | None = None) -> float:
        """The forget metric, or another, of `forget`, `holdout` or `retain` rows as `evaluate` has it; no log line.

        Under attack a third of the forget rows, a training batch at most, is relearned, and the others are judged.
        """
        rows, batch = self._stopping_rows[split], None
        if self.args.adversary_steps and split == "forget":
            few, rows = attackers_rows(rows)
            batch = self._prepare_inputs(self.data_collator(few[: self.args.per_device_train_batch_size]))
        with self._relearned(batch):
            loop = self.evaluation_loop(self.get_eval_dataloader(rows), f"Comparing {split}")
        return loop.metrics[f"eval_{metric or self.args.forget_metric}"]

    def _check_finite(self) -> None:
        """Raise, on all processes at once, where a loss since the last step was not finite on any of them."""
        loss = self.accelerator.reduce(self._unfinished_loss).item()
        self._unfinished_loss = 0.0
        if math.isfinite(loss):
            return
        previous = next((p for cb in self.callback_handler.callbacks if (p := getattr(cb, "previous", None))), None)
        self.constrainer.restore(previous[1] if previous else None)
        kept = f"those of step {previous[0]}" if previous else "the original ones"
        raise NonFiniteLossError(
            f"the loss is {loss} after step {self.state.global_step}; the weights are back to {kept}: "
            "lower learning_rate, or choose a bounded loss such as ce_u or npo"
        )


def _mean_scores(prediction: EvalPrediction) -> dict[str, float]:
    """Means over rows, on all processes, of what `prediction_step` returns; raises `ModelError` on NaN logits."""
    scores = RowScores.from_matrix(prediction.predictions)
    if (broken := np.isnan(scores.loss)).any():
        raise ModelError(
            f"the model's logits are NaN on row {broken.argmax()} of {len(broken)}; its weights are broken: go back to "
            "an earlier checkpoint, with a lower learning_rate"
        )
    return {"loss": scores.loss.mean(), "probability": scores.probability.mean(), "accuracy": scores.accuracy.mean(),
            "entropy": scores.entropy.mean()}  # fmt: skip
