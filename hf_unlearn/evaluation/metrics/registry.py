"""The metrics by name, and suites of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

from hf_unlearn.core.registry import Registry
from hf_unlearn.data.formats import Rows
from hf_unlearn.data.wrong_answers import ALTERNATIVES
from hf_unlearn.errors import DataError
from hf_unlearn.evaluation.content import marks_content
from hf_unlearn.evaluation.measurements import MEASUREMENTS
from hf_unlearn.evaluation.metrics.base import EACH_SPLIT, RETRAINED, MeasuredColumns, UnlearningMetric, first_present
from hf_unlearn.evaluation.metrics.intervals import Estimate

METRICS: Registry[type[UnlearningMetric]] = Registry("metric", "hf_unlearn.evaluation.metrics")

Kind = TypeVar("Kind", bound=type[UnlearningMetric])

_DEFAULT = ("accuracy", "answer_probability", "loss", "entropy", "membership_auc")
CONTENT = ("content_loss", "content_known", "function_loss", "greedy_reveals")
"""Metrics of tokens that carry what was learned; they are part of every suite for models that write answers."""
_ATTACKS = (
    "membership_auc",
    "membership_auc_reference",
    "membership_auc_zlib",
    "membership_auc_min_k",
    "membership_auc_min_k_plus_plus",
    "membership_auc_gradient_norm",
)
SUITES: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    "content": CONTENT,
    "attacks": _ATTACKS,
    "tofu": (
        "answer_probability",
        "multiple_choice_probability",
        "truth_ratio",
        "rouge_l",
        "exact_memorisation",
        "extraction_strength",
        "forget_quality",
        "model_utility",
        *_ATTACKS,
        "priv_leak",
        "aggregate",
    ),
    "muse": ("verbatim_memorisation", "knowledge_memorisation", "knowledge_utility", "priv_leak"),
    "classification": (
        "accuracy",
        "unlearning_accuracy",
        "loss",
        "entropy",
        "membership_auc",
        "membership_efficacy",
        "membership_efficacy_entropy",
        "average_gap",
        "tug_of_war",
        "activation_distance",
        "js_divergence",
        "zrf",
        "entropy_distance",
    ),
}


def register_metric(name: str, **settings: object) -> Callable[[Kind], Kind]:
    """Class decorator: make an `UnlearningMetric` available under `name` in `evaluate_unlearning` and in commands.

    Example, the largest loss of a row instead of the mean:

    >>> import numpy as np
    >>> from hf_unlearn.evaluation import METRICS, UnlearningMetric, bootstrap, register_metric
    >>> from hf_unlearn.evaluation.metrics.base import NUMBER
    >>> @register_metric("largest_loss")
    ... class LargestLoss(UnlearningMetric):
    ...     '''The largest loss of a row, in nats.'''
    ...     inputs = {"loss": NUMBER}  # a column of the measurement "rows", see `RowScores`
    ...     @staticmethod
    ...     def estimate(loss, seed=0):
    ...         return bootstrap([loss], np.max, seed)
    >>> METRICS["largest_loss"].estimate([0.5, 2.0, 1.0]).value
    2.0
    >>> METRICS.remove("largest_loss")

    Args:
        name: Name in reports.
        settings: Class attributes to override, so that one class can be registered under several names, such as
            `column="entropy"` of `RowMean`.

    Raises:
        SettingsError: Another metric has this name.
    """

    def register(metric: Kind) -> Kind:
        attributes = {"__doc__": metric.__doc__, "__module__": metric.__module__, **settings}
        METRICS.add(name, type(metric.__name__, (metric,), attributes) if settings else metric)
        return metric

    return register


def choose_metrics(names: Sequence[str] | str | None, splits: Mapping[str, Rows]) -> list[str]:
    """Expand suites into names of metrics; None means those of the default suite that the splits allow.

    Raises:
        SettingsError: A name is neither a metric nor a suite.
        DataError: A metric needs a split, or rows with wrong answers, that are missing.
    """
    if names is None:
        return [name for name in _DEFAULT if not missing_splits(METRICS[name], splits)]
    chosen: list[str] = []
    for name in [names] if isinstance(names, str) else names:
        if name not in SUITES:
            METRICS.find(name, also=tuple(SUITES))
        chosen += SUITES.get(name, (name,))
    for name in chosen:
        _check_splits(name, splits)
    return list(dict.fromkeys(chosen))


def missing_splits(metric: type[UnlearningMetric], splits: Mapping[str, object]) -> list[str]:
    """Return the splits that a metric needs and that are not given, alternatives as `a or b`."""
    needed = [split for split in metric.needs if split != EACH_SPLIT]
    return [" or ".join(split.split("|")) for split in needed if first_present(split, splits) is None]


def measurements_by_split(metric: type[UnlearningMetric], splits: Mapping[str, Rows]) -> dict[str, tuple[str, ...]]:
    """Return the measurements that a metric needs of the given splits, by name of the split.

    A metric of each split skips the splits without wrong answers, or without content, if it reads these.
    """
    if EACH_SPLIT in metric.needs:
        names = metric.needs[EACH_SPLIT]
        return {
            split: names
            for split in splits
            if (not _reads_wrong_answers(names) or _has_wrong_answers(splits[split]))
            and (not _reads_content(names) or marks_content(splits[split]))
        }
    by_split = ((first_present(split, splits), names) for split, names in metric.needs.items())
    return {split: names for split, names in by_split if split is not None}


def wanted_measurements(names: Sequence[str], splits: Mapping[str, Rows]) -> dict[str, set[str]]:
    """Return the measurements that several metrics need, by split; a split that none of them reads has an empty set."""
    wanted: dict[str, set[str]] = {split: set() for split in splits}
    for name in names:
        for split, measurements in measurements_by_split(METRICS[name], splits).items():
            wanted[split].update(measurements)
    return wanted


def estimate_metrics(
    names: Sequence[str], measured: MeasuredColumns, splits: Mapping[str, Rows], model: str
) -> Iterator[tuple[str, str, Estimate]]:
    """Yield (metric, split, estimate) of every metric for one model; `splits` are those that were measured."""
    for name in names:
        metric = METRICS[name]
        if not (metric.against_retrained and model == RETRAINED):
            reported = list(measurements_by_split(metric, splits))
            for split in reported if EACH_SPLIT in metric.needs else reported[:1]:
                yield name, split, metric.from_columns(measured, model, split)


def _check_splits(name: str, splits: Mapping[str, Rows]) -> None:
    metric = METRICS[name]
    if missing := missing_splits(metric, splits):
        raise DataError(f"metric {name!r} needs a split {', '.join(missing)}; the splits are {', '.join(splits)}")
    if metric_reads_content(name):  # the masks are made of the original model, which is not known here
        return
    by_split = measurements_by_split(metric, splits)
    without = [
        split
        for split, names in by_split.items()
        if _reads_wrong_answers(names) and not _has_wrong_answers(splits[split])
    ]
    if without or not by_split:
        raise DataError(
            f"metric {name!r} needs wrong answers, and the split {', '.join(without or splits)} has none; give rows "
            "with a column 'perturbed_answer', as TOFU's *_perturbed splits"
        )


def metric_reads_content(name: str) -> bool:
    """Return whether a metric reads which labels are content."""
    return any(_reads_content(names) for names in METRICS[name].needs.values())


def _reads_content(measurements: Sequence[str]) -> bool:
    return any(MEASUREMENTS.find(name).reads_content for name in measurements)


def _reads_wrong_answers(measurements: Sequence[str]) -> bool:
    return any(MEASUREMENTS.find(name).reads_wrong_answers for name in measurements)


def _has_wrong_answers(rows: Rows) -> bool:
    return len(rows) > 0 and ALTERNATIVES in rows[0]
