"""`evaluate_unlearning`: the same metrics for the original, the unlearned and the retrained model."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_unlearn.core.provenance import hardware, package_versions
from hf_unlearn.core.sharding import is_sharded
from hf_unlearn.data.batches import default_collator
from hf_unlearn.data.encoding import encode_dataset
from hf_unlearn.errors import DataError, ModelError
from hf_unlearn.evaluation.measurements import MeasurementTools, measure
from hf_unlearn.evaluation.metrics.intervals import Estimate, Undefined
from hf_unlearn.evaluation.metrics.registry import JUDGES, TEACHER, Found, choose, judge_all, needed
from hf_unlearn.evaluation.report import MetricValue, UnlearningReport
from hf_unlearn.models.adapters import without_wrapper
from hf_unlearn.models.fingerprint import model_fingerprint

ModelOrScope = nn.Module | Callable[[], AbstractContextManager[nn.Module]]


def evaluate_unlearning(
    model: nn.Module,
    splits: Mapping[str, Any],
    *,
    original: ModelOrScope | None = None,
    retrained: ModelOrScope | None = None,
    metrics: Sequence[str] | None = None,
    processing_class: Any = None,
    collator: Callable | None = None,
    batch_size: int = 16,
    seed: int = 0,
    cache_dir: str | os.PathLike | None = None,
) -> UnlearningReport:
    """Measure every split under every model, once, and make all metrics of that.

    In a distributed run the rows are shared out, and every process returns the same report.

    Args:
        model: The unlearned model.
        splits: Rows by name; at least `forget`. `retain` and `holdout` are the usual others.
        original: The model before, or a callable that gives a context manager around it
            (`StepConstrainer.original` through `UnlearningTrainer.original_model`).
        retrained: The model trained without the forget rows, if there is one; what compares with it is undefined
            otherwise.
        metrics: Names of `judge.JUDGES` or suites of them: `default`, `tofu`, `muse`, `classification`, `attacks`.
            Default: accuracy, answer probability, loss and entropy of every split, and with a split `holdout`
            `membership_auc`, the loss attack; 0.5 means that forget rows cannot be told from held-out ones.
        processing_class: Tokenizer, needed for raw text rows and generated answers.
        collator: Rows to batch; default pads on the right.
        batch_size: Rows a forward pass.
        seed: Seed of the bootstrap.
        cache_dir: Folder where measured columns are kept, and found again for the same weights and rows.

    Raises:
        DataError: An empty split, a row without labels or, where a metric reads them, wrong answers; a split that is
            missing.
        SettingsError: An unknown metric.
    """
    rows = _encoded(splits, processing_class, model)
    names = choose(metrics, rows)
    tools = MeasurementTools(collator or default_collator(processing_class), processing_class, batch_size)
    cache = None if cache_dir is None else Path(cache_dir)
    wanted = needed(names, rows)
    wanted["forget"].add("rows")  # the histogram of entropies
    columns: dict[str, dict[str, Any]] = {}
    for kind, given in (("original", original), ("unlearned", model), ("retrained", retrained)):
        if given is not None:
            with opened(given) as candidate:
                columns[kind] = _columns(candidate, rows, wanted, tools, cache)
    if any(JUDGES[name].needs_teacher for name in names):
        teacher = random_twin(model, seed)
        columns[TEACHER] = _columns(teacher, {"forget": rows["forget"]}, {"forget": {"classes"}}, tools, None)
    report = UnlearningReport(versions=package_versions(), hardware=hardware())
    for kind in (kind for kind in columns if kind != TEACHER):
        report.entropies[kind] = columns[kind]["forget"]["entropy"].tolist()
        judged = judge_all(names, Found(columns, seed), rows, kind)
        report.metrics += [record(name, split, kind, estimate, seed) for name, split, estimate in judged]
    return report


def training_metrics(
    splits: Mapping[str, Any],
    metrics: Sequence[str],
    *,
    retrained: nn.Module | None = None,
    processing_class: Any = None,
    collator: Callable | None = None,
    batch_size: int = 16,
) -> Callable[[nn.Module], dict[str, float]]:
    """What `UnlearningTrainer(extra_metrics=...)` takes: any metrics at each evaluation, as `{split}_{metric}`.

    `metric_for_best_model="forget_forget_quality"` or `"retain_model_utility"` then keeps the best checkpoint by them.
    The retrained model is measured once, here; it also says what raw rows are to become (without it, rows of a language
    model). Arguments and errors are those of `evaluate_unlearning`.
    """
    rows = _encoded(splits, processing_class, retrained)
    names = choose(metrics, rows)
    tools = MeasurementTools(collator or default_collator(processing_class), processing_class, batch_size)
    wanted = needed(names, rows)
    fixed = {} if retrained is None else {"retrained": _columns(retrained, rows, wanted, tools, None)}

    def judge(model: nn.Module) -> dict[str, float]:
        found = Found({"unlearned": _columns(model, rows, wanted, tools, None), **fixed})
        return {f"{split}_{name}": made.value for name, split, made in judge_all(names, found, rows, "unlearned")}

    return judge


def _encoded(splits: Mapping[str, Any], processing_class: Any, model: nn.Module | None) -> dict[str, Any]:
    if "forget" not in splits:
        raise DataError(f"the splits are {sorted(splits)}; one must be named 'forget'")
    return {name: encode_dataset(data, processing_class, what=name, model=model) for name, data in splits.items()}


def record(name: str, split: str, model: str, found: Estimate, seed: int) -> MetricValue:
    """An estimate as the report has it."""
    reason = found.reason if isinstance(found, Undefined) else ""
    return MetricValue(name, found.value, split, model, found.n, found.low, found.high, seed, reason)


def _columns(
    model: nn.Module,
    rows: Mapping[str, Any],
    wanted: Mapping[str, set[str]],
    tools: MeasurementTools,
    cache: Path | None,
) -> dict[str, Any]:
    cache = None if is_sharded(model) else cache  # its weights are not all here to be told from another's
    key = "" if cache is None else model_fingerprint(model)
    return {name: measure(wanted[name], model, data, tools, cache, key) for name, data in rows.items()}


def random_twin(model: nn.Module, seed: int = 0) -> nn.Module:
    """A model of the same kind and precision with fresh random weights; the random state is left alone.

    Raises:
        ModelError: A layer with weights does not say how it is initialised.
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
def opened(given: ModelOrScope) -> Iterator[nn.Module]:
    """A model that is given as it is, or by a callable that gives a context manager around it."""
    if isinstance(given, nn.Module):
        yield given
    else:
        with given() as model:
            yield model
