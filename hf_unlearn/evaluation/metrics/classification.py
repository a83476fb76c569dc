"""Metrics of classifiers; most compare with a model retrained without the forget rows.

Shapes: N rows, C classes. Accuracies and rates are shares in [0, 1].
"""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import rel_entr
from scipy.stats import wasserstein_distance

from hf_unlearn.evaluation.measurements import Columns
from hf_unlearn.evaluation.metrics.base import (
    NUMBER,
    NUMBERS,
    RETRAINED,
    ROWS,
    TEST,
    TEXT,
    MeasuredColumns,
    UnlearningMetric,
    grouped_columns,
)
from hf_unlearn.evaluation.metrics.intervals import NO_RETRAINED, Estimate, bootstrap, bootstrap_mean, undefined
from hf_unlearn.evaluation.metrics.membership import ROLES, never_seen
from hf_unlearn.evaluation.metrics.registry import register_metric

SMALLEST_ENTROPY = 1e-7  # nats; about the smallest entropy of a confident prediction in single precision


@register_metric("unlearning_accuracy")
class UnlearningAccuracy(UnlearningMetric):
    """Unlearning accuracy (UA): `1 - accuracy` on the forget set."""

    inputs = {"accuracy": NUMBER}
    needs = {"forget": ROWS}

    @staticmethod
    def estimate(accuracy: ArrayLike, seed: int = 0) -> Estimate:
        return bootstrap_mean(1 - np.asarray(accuracy, dtype=np.float64), seed)


class _Gaps(UnlearningMetric):
    """Absolute differences to the retrained model of several rates, combined."""

    inputs = {"group": TEXT, "score": NUMBER, "retrained_score": NUMBER}
    needs = dict.fromkeys(("forget", "retain", TEST), ROWS)
    against_retrained = True
    groups: ClassVar[tuple[str, ...]]

    @classmethod
    def from_columns(cls, measured: MeasuredColumns, model: str, split: str) -> Estimate:
        group, score_N = grouped_columns(_rates(measured, model, cls.groups))
        retrained_N = None
        if measured.has_retrained:
            retrained_N = grouped_columns(_rates(measured, RETRAINED, cls.groups))[1]
        return cls.estimate(group, score_N, retrained_N, measured.seed)


def _rates(measured: MeasuredColumns, model: str, groups: Sequence[str]) -> dict[str, NDArray]:
    """Return each row's score (0 or 1) in accuracies and MIA-efficacy, by group."""
    columns = {role: measured.of(model, split) for role, split in ROLES.items()}
    return {group: _RATES[group](columns) for group in groups}


_RATES: dict[str, Callable[[Mapping[str, Columns]], NDArray]] = {
    "unlearning": lambda columns: 1 - columns["forget"]["accuracy"],
    "retain": lambda columns: columns["retain"]["accuracy"],
    "test": lambda columns: columns["test"]["accuracy"],
    "membership": lambda columns: never_seen(*(columns[role]["probability"] for role in ROLES)),
}


@register_metric("average_gap")
class AverageGap(_Gaps):
    """Average gap (Fan et al., ICLR 2024): mean over groups of the absolute difference to the retrained model.

    The groups are unlearning accuracy (1 - accuracy on the forget set), accuracy on the retain and on the test set, and
    MIA-efficacy. Each row has its score (0 or 1) under both models.

    >>> AverageGap.estimate(["retain", "retain", "test"], [1, 1, 0], [1, 0, 0]).value
    0.25
    """

    groups = ("unlearning", "retain", "test", "membership")

    @staticmethod
    def estimate(group: Sequence[str], score: ArrayLike, retrained_score: ArrayLike | None, seed: int = 0) -> Estimate:
        return _gaps(group, score, retrained_score, lambda gaps: np.mean(gaps, axis=0), seed)


@register_metric("tug_of_war")
class TugOfWar(_Gaps):
    """Tug of war (Zhao et al., NeurIPS 2024): product over the forget, retain and test set of
    `1 - |accuracy - accuracy of the retrained model|`; 1: equal to the retrained model on all three."""

    groups = ("unlearning", "retain", "test")

    @staticmethod
    def estimate(group: Sequence[str], score: ArrayLike, retrained_score: ArrayLike | None, seed: int = 0) -> Estimate:
        return _gaps(group, score, retrained_score, lambda gaps: np.prod(1 - np.stack(gaps), axis=0), seed)


def _gaps(
    group: Sequence[str],
    score: ArrayLike,
    retrained_score: ArrayLike | None,
    combine: Callable[[list[NDArray]], NDArray],
    seed: int,
) -> Estimate:
    """Combine each group's absolute difference of means; the two scores of a row are resampled together."""
    names = np.asarray(group)
    if retrained_score is None:
        return undefined(NO_RETRAINED, len(names))
    both_2N = np.stack([np.asarray(score, dtype=np.float64), np.asarray(retrained_score, dtype=np.float64)])
    samples = [both_2N[:, names == name] for name in dict.fromkeys(names)]
    return bootstrap(samples, lambda *pairs, axis: combine([abs((p[0] - p[1]).mean(axis=axis)) for p in pairs]), seed)


@register_metric("activation_distance")
class ActivationDistance(UnlearningMetric):
    """Mean L2 distance between the softmax outputs of the unlearned and of the retrained model on forget rows
    (Golatkar et al., CVPR 2021)."""

    inputs = {"probabilities": NUMBERS, "retrained_probabilities": NUMBERS}
    needs = {"forget": ("classes",)}
    against_retrained = True

    @staticmethod
    def estimate(probabilities: ArrayLike, retrained_probabilities: ArrayLike | None, seed: int = 0) -> Estimate:
        if retrained_probabilities is None:
            return undefined(NO_RETRAINED, len(np.asarray(probabilities)))
        p_NC, q_NC = (np.asarray(p, dtype=np.float64) for p in (probabilities, retrained_probabilities))
        return bootstrap_mean(np.linalg.norm(p_NC - q_NC, axis=1), seed)


@register_metric("js_divergence")
class JSDivergence(UnlearningMetric):
    """Mean Jensen-Shannon divergence, in nats (at most log 2), between the softmax outputs of the unlearned and of the
    retrained model on forget rows (Chundawat et al., AAAI 2023)."""

    inputs = {"probabilities": NUMBERS, "retrained_probabilities": NUMBERS}
    needs = {"forget": ("classes",)}
    against_retrained = True

    @staticmethod
    def estimate(probabilities: ArrayLike, retrained_probabilities: ArrayLike | None, seed: int = 0) -> Estimate:
        if retrained_probabilities is None:
            return undefined(NO_RETRAINED, len(np.asarray(probabilities)))
        return bootstrap_mean(js_divergences(probabilities, retrained_probabilities), seed)


@register_metric("zrf")
class ZeroRetrainForgetting(UnlearningMetric):
    """ZRF (Chundawat et al., AAAI 2023): `1 - mean JS(model, randomly initialised teacher)` on forget rows, in nats.

    The divergence is summed over the classes of each row and averaged over rows. Public ports that let `kl_div` average
    over both rows and classes also divide it by the number of classes.

    >>> round(ZeroRetrainForgetting.estimate([[1.0, 0.0]], [[0.5, 0.5]]).value, 3)
    0.784
    """

    inputs = {"probabilities": NUMBERS, "teacher_probabilities": NUMBERS}
    needs = {"forget": ("classes",)}
    needs_teacher = True

    @staticmethod
    def estimate(probabilities: ArrayLike, teacher_probabilities: ArrayLike, seed: int = 0) -> Estimate:
        return bootstrap_mean(1 - js_divergences(probabilities, teacher_probabilities), seed)


def js_divergences(p_NC: ArrayLike, q_NC: ArrayLike) -> NDArray:
    """Return the Jensen-Shannon divergence of each row's two distributions, in nats: `[N]`."""
    p_NC, q_NC = np.asarray(p_NC, dtype=np.float64), np.asarray(q_NC, dtype=np.float64)
    middle_NC = (p_NC + q_NC) / 2
    return (rel_entr(p_NC, middle_NC) + rel_entr(q_NC, middle_NC)).sum(axis=1) / 2


@register_metric("entropy_distance")
class EntropyDistance(UnlearningMetric):
    """1-D Wasserstein distance between the log10 entropies of the unlearned and the retrained model's outputs on forget
    rows, in decades: one number for the entropy histograms of PGU (WACV 2024, section 4).

    Entropies, in nats, below 1e-7 count as 1e-7.
    """

    inputs = {"entropy": NUMBER, "retrained_entropy": NUMBER}
    needs = {"forget": ROWS}
    against_retrained = True

    @staticmethod
    def estimate(entropy: ArrayLike, retrained_entropy: ArrayLike | None, seed: int = 0) -> Estimate:
        if retrained_entropy is None:
            return undefined(NO_RETRAINED, len(np.asarray(entropy)))
        logs_2N = np.stack([log_entropies(entropy), log_entropies(retrained_entropy)])
        return bootstrap([logs_2N], _sorted_distance, seed)


def log_entropies(entropy: ArrayLike) -> NDArray:
    """Return the base-10 logarithms of entropies in nats; entropies below 1e-7 count as 1e-7."""
    return np.log10(np.maximum(np.asarray(entropy, dtype=np.float64), SMALLEST_ENTROPY))


def entropy_distance(logs: ArrayLike, other_logs: ArrayLike) -> float:
    """Return the 1-D Wasserstein distance between two samples, which may have different sizes."""
    return float(wasserstein_distance(logs, other_logs))


def _sorted_distance(logs_2N: NDArray, axis: int) -> NDArray:
    """Return the same distance for two samples of equal size: the mean difference of their sorted values.

    Unlike scipy's function, it takes many resamples at once.
    """
    return abs(np.sort(logs_2N[0], axis=axis) - np.sort(logs_2N[1], axis=axis)).mean(axis=axis)


class AnamnesisIndex(UnlearningMetric):
    """Anamnesis index (Chundawat et al., TIFS 2023): steps of relearning until the forget metric is back within a
    margin of the original model's, divided by the steps of the retrained model; below 1 the model still knew something.

    One row per trial. It is undefined if the retrained model needs no step, or if a trial did not relearn (infinite
    steps). It needs relearning, so it belongs to an audit and is not registered as a metric.

    >>> AnamnesisIndex.estimate([2.0], [8.0]).value
    0.25
    """

    inputs = {"steps": NUMBER, "retrained_steps": NUMBER}

    @staticmethod
    def estimate(steps: ArrayLike, retrained_steps: ArrayLike | None, seed: int = 0) -> Estimate:
        steps_N = np.asarray(steps, dtype=np.float64)
        if retrained_steps is None:
            return undefined(NO_RETRAINED, len(steps_N))
        retrained_N = np.asarray(retrained_steps, dtype=np.float64)
        if not (np.isfinite(steps_N).all() and np.isfinite(retrained_N).all()):
            return undefined("a model did not relearn within the allowed steps", len(steps_N))
        if not retrained_N.all():
            return undefined("the retrained model needs no step", len(steps_N))
        return bootstrap_mean(steps_N / retrained_N, seed)


def relearn_steps(curve: Sequence[float], target: float, margin: float = 0.05) -> float:
    """Return the first index of `curve` that is at least `target * (1 - margin)`, infinite if there is none.

    `curve` holds the forget metric after 0, 1, ... steps.

    >>> relearn_steps([0.1, 0.5, 0.96], target=1.0)
    2
    """
    reached = (step for step, value in enumerate(curve) if value >= target * (1 - margin))
    return next(reached, np.inf)
