"""`evaluate_unlearning`: the same metrics for the original, the unlearned and the retrained model."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy

import torch
from torch import nn

from hf_unlearn.core.provenance import hardware, package_versions
from hf_unlearn.data.encoding import encode_dataset
from hf_unlearn.data.formats import Rows
from hf_unlearn.data.left_out import cut_records
from hf_unlearn.errors import DataError, ModelError
from hf_unlearn.evaluation.measurements import Columns, MeasurementTools, measure_splits
from hf_unlearn.evaluation.metrics.base import TEACHER, MeasuredColumns
from hf_unlearn.evaluation.metrics.intervals import Estimate, Undefined
from hf_unlearn.evaluation.metrics.registry import METRICS, choose_metrics, estimate_metrics, wanted_measurements
from hf_unlearn.evaluation.report import MetricValue, UnlearningReport
from hf_unlearn.models.adapters import without_wrapper
from hf_unlearn.models.tasks import Collator, ProcessingClass

ModelOrScope = nn.Module | Callable[[], AbstractContextManager[nn.Module]]


def evaluate_unlearning(
    model: nn.Module,
    splits: Mapping[str, Rows],
    *,
    original: ModelOrScope | None = None,
    retrained: ModelOrScope | None = None,
    metrics: Sequence[str] | None = None,
    processing_class: "ProcessingClass | None" = None,
    collator: Collator | None = None,
    batch_size: int = 16,
    seed: int = 0,
    cache_dir: str | os.PathLike[str] | None = None,
) -> UnlearningReport:
    """Measure every split under every model once, and compute all metrics from these measurements.

    In a distributed run the processes share the rows, and each returns the same report.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_unlearn import evaluate_unlearning
    >>> _ = torch.manual_seed(0)
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2))
    >>> row = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}
    >>> report = evaluate_unlearning(model, {"forget": [row] * 4, "retain": [row]}, metrics=["accuracy"])
    >>> print(report.table())
    metric    split   unlearned             n
    --------  ------  --------------------  -
    accuracy  forget  0.000 [0.000, 0.000]  4
    accuracy  retain  0.000 [0.000, 0.000]  1

    Args:
        model: The unlearned model.
        splits: Rows by name of the split, raw or encoded. `forget` is required; `retain` and `holdout` are usual.
        original: The model before unlearning, or a callable that returns a context manager around it, such as
            `UnlearningTrainer.original_model`.
        retrained: The model trained without the forget rows, or such a callable. Without it, metrics that compare with
            it are undefined.
        metrics: Names of metrics or of suites (`default`, `tofu`, `muse`, `classification`, `attacks`). Default:
            accuracy, answer probability, loss and entropy of every split and, if there is a split `holdout` or `test`,
            `membership_auc` of the loss attack, where 0.5 means that forget and held-out rows cannot be told apart.
        processing_class: Tokenizer or image processor, needed for raw rows and for generated answers.
        collator: Makes batches of rows; default: pad on the right.
        batch_size: Rows per forward pass.
        seed: Seed of the bootstrap.
        cache_dir: Folder that keeps measured columns, to be reused for the same weights and rows.

    Raises:
        DataError: A split is missing or empty, or a row has no labels, or no wrong answers where a metric reads them.
        SettingsError: A metric is unknown.
    """
    rows = encode_splits(splits, processing_class, model)
    names = choose_metrics(metrics, rows)
    tools = MeasurementTools.build(processing_class, collator, batch_size, cache_dir)
    wanted = wanted_measurements(names, rows)
    wanted["forget"].add("rows")  # the histogram of entropies
    columns: dict[str, Mapping[str, Columns]] = {}
    for name, model_or_scope in (("original", original), ("unlearned", model), ("retrained", retrained)):
        if model_or_scope is not None:
            with model_scope(model_or_scope) as candidate:
                columns[name] = measure_splits(candidate, rows, wanted, tools)
    measured_models = list(columns)
    if any(METRICS[name].needs_teacher for name in names):
        columns[TEACHER] = _teacher_columns(model, names, rows, tools, seed)
    report = UnlearningReport(data=cut_records(rows), versions=package_versions(), hardware=hardware())
    for name in measured_models:
        report.entropies[name] = columns[name]["forget"]["entropy"].tolist()
        estimates = estimate_metrics(names, MeasuredColumns(columns, seed), rows, name)
        report.metrics += [metric_value(metric, split, name, estimate, seed) for metric, split, estimate in estimates]
    return report


def training_metrics(
    splits: Mapping[str, Rows],
    metrics: Sequence[str],
    *,
    retrained: nn.Module | None = None,
    processing_class: "ProcessingClass | None" = None,
    collator: Collator | None = None,
    batch_size: int = 16,
) -> Callable[[nn.Module], dict[str, float]]:
    """Return a function for `UnlearningTrainer(extra_metrics=...)`, which computes metrics at each evaluation.

    The function maps a model to `{split}_{metric}: value`. `metric_for_best_model="forget_forget_quality"` or
    `"retain_model_utility"` then keeps the best checkpoint by such a metric. The retrained model is measured once, when
    this function is called. It also determines how raw rows are encoded; without it they are encoded for a causal
    language model. Arguments and errors are those of `evaluate_unlearning`.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_unlearn import training_metrics
    >>> rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}]
    >>> compute = training_metrics({"forget": rows, "retain": rows}, ["exact_memorisation"])
    >>> model = LlamaForCausalLM(LlamaConfig(
    ...     vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2))
    >>> sorted(compute(model))
    ['forget_exact_memorisation', 'retain_exact_memorisation']
    """
    rows = encode_splits(splits, processing_class, retrained)
    names = choose_metrics(metrics, rows)
    tools = MeasurementTools.build(processing_class, collator, batch_size)
    wanted = wanted_measurements(names, rows)
    columns_of_retrained = {} if retrained is None else {"retrained": measure_splits(retrained, rows, wanted, tools)}

    def compute(model: nn.Module) -> dict[str, float]:
        columns: dict[str, Mapping[str, Columns]] = {
            "unlearned": measure_splits(model, rows, wanted, tools),
            **columns_of_retrained,
        }
        if any(METRICS[name].needs_teacher for name in names):
            columns[TEACHER] = _teacher_columns(model, names, rows, tools, seed=0)
        estimates = estimate_metrics(names, MeasuredColumns(columns), rows, "unlearned")
        return {f"{split}_{name}": estimate.value for name, split, estimate in estimates}

    return compute


def encode_splits(
    splits: Mapping[str, Rows], processing_class: "ProcessingClass | None", model: nn.Module | None
) -> dict[str, Rows]:
    """Encode the rows of every split; raises `DataError` if there is none of the name `forget`."""
    if not isinstance(splits, Mapping):
        raise DataError(f"the splits are a {type(splits).__name__}; name them, such as {{'forget': rows}}")
    if "forget" not in splits:
        raise DataError(f"the splits are {sorted(splits)}; one must be named 'forget'")
    return {name: encode_dataset(data, processing_class, what=name, model=model) for name, data in splits.items()}


def metric_value(name: str, split: str, model: str, estimate: Estimate, seed: int) -> MetricValue:
    """Return an estimate as the report stores it."""
    reason = estimate.reason if isinstance(estimate, Undefined) else ""
    return MetricValue(name, estimate.value, split, model, estimate.n, estimate.low, estimate.high, seed, reason)


def _teacher_columns(
    model: nn.Module, names: Sequence[str], rows: Mapping[str, Rows], tools: MeasurementTools, seed: int
) -> Mapping[str, Columns]:
    """Measure a randomly initialised model on the splits of the metrics that compare with it."""
    needing = [name for name in names if METRICS[name].needs_teacher]
    wanted = {split: needed for split, needed in wanted_measurements(needing, rows).items() if needed}
    uncached = MeasurementTools(tools.collator, tools.tokenizer, tools.batch_size)
    return measure_splits(random_twin(model, seed), {split: rows[split] for split in wanted}, wanted, uncached)


def random_twin(model: nn.Module, seed: int = 0) -> nn.Module:
    """Return a model of the same architecture and precision with new random weights; the random state is restored.

    Raises:
        ModelError: A layer with weights has no `reset_parameters()`.
    """
    model = without_wrapper(model)
    weight = next(model.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if hasattr(model, "config") and hasattr(model, "init_weights"):
            twin = type(model)(deepcopy(model.config))
        else:
            twin = deepcopy(model)
            for name, module in twin.named_modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
                elif next(module.parameters(recurse=False), None) is not None:
                    raise ModelError(f"layer {name or type(module).__name__} has weights and no reset_parameters()")
    return twin.to(device=weight.device, dtype=weight.dtype).eval()


@contextmanager
def model_scope(model_or_scope: ModelOrScope) -> Iterator[nn.Module]:
    """Yield a model that is passed as it is or as a callable that returns a context manager around it."""
    if isinstance(model_or_scope, nn.Module):
        yield model_or_scope
    else:
        with model_or_scope() as model:
            yield model
