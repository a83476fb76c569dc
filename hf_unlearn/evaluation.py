"""`evaluate_unlearning`: the same scores for the original, the unlearned and the retrained model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
from torch import nn

from hf_unlearn.data import default_collator, encode_dataset
from hf_unlearn.errors import DataError, SettingsError
from hf_unlearn.fingerprint import hardware, package_versions
from hf_unlearn.metrics import Estimate, RowScores, bootstrap_auc, bootstrap_mean, score_rows
from hf_unlearn.report import Metric, UnlearningReport

ROW_METRICS: dict[str, Callable[[RowScores], np.ndarray]] = {
    "accuracy": lambda scores: scores.accuracy,
    "answer_probability": lambda scores: scores.probability,
    "loss": lambda scores: scores.loss,
    "entropy": lambda scores: scores.entropy,
}
METRICS = (*ROW_METRICS, "membership_auc")

ModelOrScope = nn.Module | Callable[[], AbstractContextManager[nn.Module]]


def evaluate_unlearning(
    model: nn.Module,
    splits: Mapping[str, Any],
    *,
    original: ModelOrScope | None = None,
    retrained: ModelOrScope | None = None,
    metrics: Sequence[str] = METRICS,
    processing_class: Any = None,
    collator: Callable | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> UnlearningReport:
    """Score every split under every model.

    `membership_auc` is the loss attack (Yeom et al., CSF 2018): forget rows, the members, against held-out rows;
    0.5 means that they cannot be told apart. It needs the splits `forget` and `holdout`.

    Args:
        model: The unlearned model.
        splits: Rows by name; at least `forget`. `retain` and `holdout` are the usual others.
        original: The model before, or a callable that gives a context manager around it
            (`StepConstrainer.original` through `UnlearningTrainer.original_model`).
        retrained: The model trained without the forget rows, if there is one.
        metrics: Which of `METRICS` to report.
        processing_class: Tokenizer, needed for raw text rows.
        collator: Rows to batch; default pads on the right.
        batch_size: Rows a forward pass.
        seed: Seed of the bootstrap.

    Raises:
        DataError: An empty split, a row without labels, or no split named `forget`.
        SettingsError: An unknown metric.
    """
    if "forget" not in splits:
        raise DataError(f"the splits are {sorted(splits)}; one must be named 'forget'")
    for name in metrics:
        if name not in METRICS:
            raise SettingsError(f"unknown metric {name!r}; choose from {', '.join(METRICS)}")
    rows = {name: encode_dataset(data, processing_class, what=name, model=model) for name, data in splits.items()}
    collator = collator or default_collator(processing_class)
    report = UnlearningReport(versions=package_versions(), hardware=hardware())
    for kind, given in (("original", original), ("unlearned", model), ("retrained", retrained)):
        if given is None:
            continue
        with _scope(given) as candidate:
            scores = {name: score_rows(candidate, data, collator, batch_size) for name, data in rows.items()}
        report.metrics += list(_metrics(scores, kind, metrics, seed))
        report.entropies[kind] = scores["forget"].entropy.tolist()
    return report


@contextmanager
def _scope(given: ModelOrScope) -> Iterator[nn.Module]:
    if isinstance(given, nn.Module):
        yield given
    else:
        with given() as model:
            yield model


def _metrics(scores: Mapping[str, RowScores], kind: str, names: Sequence[str], seed: int) -> Iterator[Metric]:
    for name in names:
        if name == "membership_auc":
            if "holdout" in scores:
                found = bootstrap_auc(-scores["forget"].loss, -scores["holdout"].loss, seed)
                yield _record(name, "forget", kind, found, seed)
            continue
        for split, rows in scores.items():
            yield _record(name, split, kind, bootstrap_mean(ROW_METRICS[name](rows), seed), seed)


def _record(name: str, split: str, model: str, found: Estimate, seed: int) -> Metric:
    return Metric(name, found.value, split, model, found.n, found.low, found.high, seed)
