"""`evaluate_unlearning`: the same metrics for the original, the unlearned and the retrained model."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy

import torch
from torch import nn

from hf_unlearn.core.provenance import hardware, package_versions
from hf_unlearn.data.encoding import encode_dataset
from hf_unlearn.data.formats import SECRET, Rows, rows_of
from hf_unlearn.data.left_out import cut_records
from hf_unlearn.errors import DataError, ModelError
from hf_unlearn.evaluation.content import add_content, content_record, marks_content
from hf_unlearn.evaluation.generation import can_answer, can_decode, require_tokenizer
from hf_unlearn.evaluation.greedy import with_phrases
from hf_unlearn.evaluation.measurements import Columns, MeasurementTools, measure_splits
from hf_unlearn.evaluation.metrics.base import TEACHER, TEST, MeasuredColumns, first_present
from hf_unlearn.evaluation.metrics.intervals import Estimate, Undefined
from hf_unlearn.evaluation.metrics.registry import (
    CONTENT,
    METRICS,
    SUITES,
    choose_metrics,
    estimate_metrics,
    metric_reads_content,
    wanted_measurements,
)
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
    reference: ModelOrScope | None = None,
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
        reference: The checkpoint before the original was fine-tuned, or such a callable. It tells which tokens of the
            forget rows are content, that is, what the original has learned from them (`evaluation.content`). Without
            it, and for rows without a `secret`, the original's prediction without context does.
        metrics: Names of metrics or of suites (`default`, `content`, `tofu`, `muse`, `classification`, `attacks`).
            Default: accuracy, answer probability, loss and entropy of every split and, if there is a split `holdout` or
            `test`, `membership_auc` of the loss attack, where 0.5 means that forget and held-out rows cannot be told
            apart. For language models and encoder-decoders, the default and the suites `tofu` and `muse` also have the
            metrics of the suite `content`, if an original model is given or the rows name their secrets.
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
    rows = mark_content(rows, metrics, original, reference, tools)
    names = with_content_metrics(names, metrics, rows, model, tools)
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
    if any(map(metric_reads_content, names)):
        report.content_counts = {split: content_record(data) for split, data in rows.items() if marks_content(data)}
    for name in measured_models:
        report.entropies[name] = columns[name]["forget"]["entropy"].tolist()
        estimates = estimate_metrics(names, MeasuredColumns(columns, seed), rows, name)
        report.metrics += [metric_value(metric, split, name, estimate, seed) for metric, split, estimate in estimates]
    return report


def mark_content(
    rows: Mapping[str, Rows],
    metrics: Sequence[str] | str | None,
    original: ModelOrScope | None,
    reference: ModelOrScope | None,
    tools: MeasurementTools,
) -> dict[str, Rows]:
    """Return encoded splits whose forget and held-out rows say which labels are content, if the metrics read it.

    Rows that say so already keep their masks. The masks are those of the original model; without it, only rows with a
    `secret` have some.
    """
    holdout = first_present(TEST, rows)
    marked = [name for name in ("forget", holdout) if name is not None]
    if original is None or not _asks_for_content(metrics) or all(marks_content(rows[name]) for name in marked):
        return dict(rows)
    unseen = () if holdout is None else (holdout,)
    reference_scope: AbstractContextManager[nn.Module | None] = nullcontext()
    if reference is not None:
        reference_scope = model_scope(reference)
    with model_scope(original) as before, reference_scope as without:
        found = add_content(rows, before, tools.collator, without, unseen=unseen, batch_size=tools.batch_size)
    if marks_content(found["forget"]) and can_decode(tools.tokenizer):
        common = [] if holdout is None else rows_of(found[holdout])
        found["forget"] = with_phrases(found["forget"], require_tokenizer(tools.tokenizer), common)
    return found


def with_content_metrics(
    names: Sequence[str],
    metrics: Sequence[str] | str | None,
    rows: Mapping[str, Rows],
    model: nn.Module,
    tools: MeasurementTools,
) -> list[str]:
    """Return the names of metrics, with those of content that can be measured if a suite asks for them.

    Raises:
        DataError: A metric of content was asked for by name, and no row says which labels are content.
    """
    is_marked = {"greedy_reveals": marks_content(rows["forget"])}
    can_ask = is_marked["greedy_reveals"] and can_answer(model) and can_decode(tools.tokenizer)
    any_marked = any(map(marks_content, rows.values()))
    own = [name for name in CONTENT if (can_ask if name == "greedy_reveals" else any_marked)]
    asked = [name for name in ([metrics] if isinstance(metrics, str) else metrics or ()) if name not in SUITES]
    for name in asked:
        if metric_reads_content(name) and not is_marked.get(name, any_marked):
            raise DataError(
                f"metric {name!r} reads which tokens are content, and no row says so; pass the original model, or name "
                f"what is to be forgotten in a column {SECRET!r}"
            )
    others = [name for name in names if name in asked or not metric_reads_content(name)]
    return [*others, *(name for name in own if name not in others)] if _names_suite(metrics) else others


def _asks_for_content(metrics: Sequence[str] | str | None) -> bool:
    """Return whether metrics that were asked for read which labels are content."""
    names = [metrics] if isinstance(metrics, str) else metrics or ()
    return _names_suite(metrics) or any(name in METRICS and metric_reads_content(name) for name in names)


def _names_suite(metrics: Sequence[str] | str | None) -> bool:
    """Return whether a suite that speaks of answers was asked for; None is the default one."""
    names = [metrics] if isinstance(metrics, str) else metrics
    return names is None or bool({"default", "content", "tofu", "muse"} & set(names))


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
