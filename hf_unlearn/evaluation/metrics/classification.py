"""Metrics of classifiers, most of them against a model retrained without the forget rows.

Shapes: N rows, C classes. Accuracies and rates are shares in [0, 1].
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import rel_entr
from scipy.stats import wasserstein_distance

from hf_unlearn.evaluation.metrics.base import NUMBER, NUMBERS, TEXT, UnlearningMetric
from hf_unlearn.evaluation.metrics.intervals import Estimate, bootstrap, bootstrap_mean, undefined

SMALLEST_ENTROPY = 1e-7  # nats; single precision knows no smaller entropy of a confident prediction

NO_RETRAINED = "no retrained model was given"


class AverageGap(UnlearningMetric):
    """Average gap (Fan et al., ICLR 2024): mean over groups of the absolute difference to the retrained model.

    Groups are unlearning accuracy (1 - accuracy on the forget set), accuracy on the retain and on the test set, and
    MIA-efficacy; each row has its score (0 or 1) under both models.
    """

    inputs = {"group": TEXT, "score": NUMBER, "retrained_score": NUMBER}

    @staticmethod
    def estimate(group: Sequence[str], score: ArrayLike, retrained_score: ArrayLike | None, seed: int = 0) -> Estimate:
        return _gaps(group, score, retrained_score, lambda gaps: np.mean(gaps, axis=0), seed)


class TugOfWar(UnlearningMetric):
    """Tug of war (Zhao et al., NeurIPS 2024): product over the forget, retain and test set of
    `1 - |accuracy - accuracy of the retrained model|`; 1 is like the retrained model on all three."""

    inputs = {"group": TEXT, "score": NUMBER, "retrained_score": NUMBER}

    @staticmethod
    def estimate(group: Sequence[str], score: ArrayLike, retrained_score: ArrayLike | None, seed: int = 0) -> Estimate:
        return _gaps(group, score, retrained_score, lambda gaps: np.prod(1 - np.stack(gaps), axis=0), seed)


def _gaps(
    group: Sequence[str],
    score: ArrayLike,
    retrained_score: ArrayLike | None,
    combine: Callable[[list[NDArray]], Any],
    seed: int,
) -> Estimate:
    """`combine` of each group's absolute difference of means, rows being drawn with their two scores together."""
    names = np.asarray(group)
    if retrained_score is None:
        return undefined(NO_RETRAINED, len(names))
    both_2N = np.stack([np.asarray(score, dtype=np.float64), np.asarray(retrained_score, dtype=np.float64)])
    samples = [both_2N[:, names == name] for name in dict.fromkeys(names)]
    return bootstrap(samples, lambda *parts, axis: combine([abs((p[0] - p[1]).mean(axis=axis)) for p in parts]), seed)


class ActivationDistance(UnlearningMetric):
    """Mean L2 distance between the softmax outputs of the unlearned and of the retrained model on forget rows
    (Golatkar et al., CVPR 2021)."""

    inputs = {"probabilities": NUMBERS, "retrained_probabilities": NUMBERS}

    @staticmethod
    def estimate(probabilities: Any, retrained_probabilities: Any, seed: int = 0) -> Estimate:
        if retrained_probabilities is None:
            return undefined(NO_RETRAINED, len(probabilities))
        p_NC, q_NC = (np.asarray(p, dtype=np.float64) for p in (probabilities, retrained_probabilities))
        return bootstrap_mean(np.linalg.norm(p_NC - q_NC, axis=1), seed)


class JSDivergence(UnlearningMetric):
    """Mean Jensen-Shannon divergence, in nats (at most log 2), between the softmax outputs of the unlearned and of the
    retrained model on forget rows (Chundawat et al., AAAI 2023)."""

    inputs = {"probabilities": NUMBERS, "retrained_probabilities": NUMBERS}

    @staticmethod
    def estimate(probabilities: Any, retrained_probabilities: Any, seed: int = 0) -> Estimate:
        if retrained_probabilities is None:
            return undefined(NO_RETRAINED, len(probabilities))
        return bootstrap_mean(js_divergences(probabilities, retrained_probabilities), seed)


class ZeroRetrainForgetting(UnlearningMetric):
    """ZRF (Chundawat et al., AAAI 2023): `1 - mean JS(model, randomly initialised teacher)` on forget rows, in nats.

    The divergence is each row's sum over classes and then averaged over rows; public ports that let `kl_div` average
    over rows and classes alike divide it by the number of classes, too.
    """

    inputs = {"probabilities": NUMBERS, "teacher_probabilities": NUMBERS}

    @staticmethod
    def estimate(probabilities: Any, teacher_probabilities: Any, seed: int = 0) -> Estimate:
        return bootstrap_mean(1 - js_divergences(probabilities, teacher_probabilities), seed)


def js_divergences(p_NC: Any, q_NC: Any) -> NDArray:
    """`[N]`: Jensen-Shannon divergence of each row's two distributions, in nats."""
    p_NC, q_NC = np.asarray(p_NC, dtype=np.float64), np.asarray(q_NC, dtype=np.float64)
    middle_NC = (p_NC + q_NC) / 2
    return (rel_entr(p_NC, middle_NC) + rel_entr(q_NC, middle_NC)).sum(axis=1) / 2


class EntropyDistance(UnlearningMetric):
    """1-D Wasserstein distance between the log10 entropies of the unlearned and the retrained model's outputs on forget
    rows, in decades: one number for the entropy histograms of PGU (WACV 2024, section 4).

    Entropies, in nats, below 1e-7 count as 1e-7.
    """

    inputs = {"entropy": NUMBER, "retrained_entropy": NUMBER}

    @staticmethod
    def estimate(entropy: ArrayLike, retrained_entropy: ArrayLike | None, seed: int = 0) -> Estimate:
        if retrained_entropy is None:
            return undefined(NO_RETRAINED, len(np.asarray(entropy)))
        logs_2N = np.stack([log_entropies(entropy), log_entropies(retrained_entropy)])
        return bootstrap([logs_2N], _sorted_distance, seed)


def log_entropies(entropy: ArrayLike) -> NDArray:
    """Base-10 logarithms of entropies in nats."""
    return np.log10(np.maximum(np.asarray(entropy, dtype=np.float64), SMALLEST_ENTROPY))


def entropy_distance(logs: ArrayLike, other_logs: ArrayLike) -> float:
    """1-D Wasserstein distance between two samples of any sizes."""
    return float(wasserstein_distance(logs, other_logs))


def _sorted_distance(logs_2N: NDArray, axis: int) -> Any:
    """The same of samples of equal size, also of many resamples: the mean difference of their sorted values."""
    return abs(np.sort(logs_2N[0], axis=axis) - np.sort(logs_2N[1], axis=axis)).mean(axis=axis)


class AnamnesisIndex(UnlearningMetric):
    """Anamnesis index (Chundawat et al., TIFS 2023): steps of relearning until the forget metric is back within a
    margin of the original model's, over those of the retrained model; below 1 something was still there.

    One row a trial. Undefined where the retrained model needs no step, or a trial did not get there (infinite).
    """

    inputs = {"steps": NUMBER, "retrained_steps": NUMBER}

    @staticmethod
    def estimate(steps: ArrayLike, retrained_steps: ArrayLike | None, seed: int = 0) -> Estimate:
        steps_N = np.asarray(steps, dtype=np.float64)
        if retrained_steps is None:
            return undefined(NO_RETRAINED, len(steps_N))
        retrained_N = np.asarray(retrained_steps, dtype=np.float64)
        if not (np.isfinite(steps_N).all() and np.isfinite(retrained_N).all()):
            return undefined("a model did not relearn within the steps given", len(steps_N))
        if not retrained_N.all():
            return undefined("the retrained model needs no step", len(steps_N))
        return bootstrap_mean(steps_N / retrained_N, seed)


def relearn_steps(curve: Sequence[float], target: float, margin: float = 0.05) -> float:
    """The first index of `curve` (the forget metric after 0, 1, ... steps) within `margin` of `target`, relatively; the
    curve rises to the target. Infinite where it never gets there."""
    reached = (step for step, value in enumerate(curve) if value >= target * (1 - margin))
    return next(reached, np.inf)


def rates(groups: Mapping[str, NDArray]) -> tuple[list[str], NDArray]:
    """The columns `group` and score of rows given by group."""
    return [name for name, rows in groups.items() for _ in rows], np.concatenate(list(groups.values()))
