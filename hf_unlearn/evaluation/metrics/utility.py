"""Metrics that combine others by a harmonic mean: TOFU's model utility and OpenUnlearning's aggregate."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_unlearn.errors import DataError
from hf_unlearn.evaluation.measurements import Columns, wrong_losses
from hf_unlearn.evaluation.metrics.base import (
    NUMBER,
    RETRAINED,
    TEST,
    TEXT,
    MeasuredColumns,
    UnlearningMetric,
    grouped_columns,
)
from hf_unlearn.evaluation.metrics.intervals import Estimate, auc, bootstrap, undefined
from hf_unlearn.evaluation.metrics.language import choice_probabilities, measured_log_truth_ratios, truth_scores
from hf_unlearn.evaluation.metrics.membership import members_and_scores
from hf_unlearn.evaluation.metrics.registry import register_metric

UTILITY_SPLITS = ("retain", "real_authors", "world_facts")
UTILITY_PARTS = tuple(
    f"{split}/{part}" for split in UTILITY_SPLITS for part in ("probability", "rouge_l", "truth_ratio")
)
UTILITY_NEEDS = {f"{split}_perturbed|{split}": ("rows", "alternatives", "answers") for split in UTILITY_SPLITS}
PRIVACY_SCORES = ("loss", "zlib", "min_k", "min_k_plus_plus")


class HarmonicMean(UnlearningMetric):
    """Harmonic mean over groups of the mean score of each group's rows; 0 where one of them is 0.

    >>> round(HarmonicMean.estimate(["a", "a", "b"], [0.0, 1.0, 1.0]).value, 3)
    0.667
    """

    inputs = {"group": TEXT, "score": NUMBER}

    @staticmethod
    def estimate(group: Sequence[str], score: ArrayLike, seed: int = 0) -> Estimate:
        score_N, names = np.asarray(score, dtype=np.float64), np.asarray(group)
        return harmonic_mean({str(name): score_N[names == name] for name in dict.fromkeys(names)}, seed)


@register_metric("model_utility")
class ModelUtility(HarmonicMean):
    """Harmonic mean of nine scores (TOFU, 2.2): probability, ROUGE-L recall and truth ratio on the retain set, on real
    authors and on world facts. On the latter two, probability is the multiple-choice probability.

    The column `group` holds names of `UTILITY_PARTS` such as `retain/probability`; all nine are needed.
    """

    needs = UTILITY_NEEDS

    @staticmethod
    def estimate(group: Sequence[str], score: ArrayLike, seed: int = 0) -> Estimate:
        if wrong := sorted(set(UTILITY_PARTS) ^ set(group)):
            raise DataError(f"model utility is the mean of nine scores; missing or unknown: {', '.join(wrong)}")
        return HarmonicMean.estimate(group, score, seed)

    @classmethod
    def from_columns(cls, measured: MeasuredColumns, model: str, split: str) -> Estimate:
        groups = {}
        for name, measured_split in zip(UTILITY_SPLITS, UTILITY_NEEDS, strict=True):
            columns = measured.of(model, measured_split)
            choices = choice_probabilities(columns["loss"], wrong_losses(columns))
            groups[f"{name}/probability"] = columns["probability"] if name == "retain" else choices
            groups[f"{name}/rouge_l"] = columns["rouge_l_recall_200"]
            groups[f"{name}/truth_ratio"] = truth_scores(measured_log_truth_ratios(columns), forget=False)
        return cls.estimate(*grouped_columns(groups), measured.seed)


def harmonic_mean(groups: Mapping[str, ArrayLike], seed: int = 0) -> Estimate:
    """Return the harmonic mean of the groups' means; each group is resampled on its own."""
    return bootstrap(list(groups.values()), lambda *means, axis: harmonic(*(m.mean(axis=axis) for m in means)), seed)


def harmonic(*values: ArrayLike) -> NDArray:
    """Return the harmonic mean of non-negative values, element by element; 0 where one of them is 0.

    >>> float(harmonic(1.0, 0.5))
    0.6666666666666666
    """
    stacked = np.stack([np.asarray(value, dtype=np.float64) for value in values])
    with np.errstate(divide="ignore"):
        return len(stacked) / (1 / stacked).sum(axis=0)


@register_metric("aggregate")
class Aggregate(UnlearningMetric):
    """Harmonic mean of memorisation, privacy and utility (OpenUnlearning, arXiv 2506.12618, section 5).

    Memorisation: harmonic mean of 1 - extraction strength, 1 - exact memorisation, 1 - probability of the paraphrase
    and 1 - p / (p + q), where q is the geometric mean over wrong answers. Privacy: harmonic mean over the loss, zlib,
    min-k and min-k++ attacks of `max(0, 1 - |AUC - AUC_retrained| / AUC_retrained)`. Utility: model utility; the
    paper's also includes the fluency of answers, from a classifier of gibberish, which is left out here. There is no
    interval.

    >>> round(Aggregate.estimate(1.0, 1.0, 0.5).value, 3)
    0.75
    """

    inputs = {"memorisation": NUMBER, "privacy": NUMBER, "utility": NUMBER}
    needs = {"forget": ("rows", "alternatives", "texts"), TEST: ("rows", "texts"), **UTILITY_NEEDS}
    against_retrained = True

    @staticmethod
    def estimate(memorisation: ArrayLike, privacy: ArrayLike, utility: ArrayLike, seed: int = 0) -> Estimate:
        means = [np.asarray(value, dtype=np.float64).mean() for value in (memorisation, privacy, utility)]
        return Estimate(float(harmonic(*means)), None, None, int(np.size(memorisation)))

    @classmethod
    def from_columns(cls, measured: MeasuredColumns, model: str, split: str) -> Estimate:
        columns = measured.of(model, split)
        n = len(columns["loss"])
        if not measured.has_retrained:
            return undefined("its privacy part compares with the retrained model, and none was given", n)
        privacy = harmonic(*(_privacy(measured, model, score) for score in PRIVACY_SCORES))
        utility = ModelUtility.from_columns(measured, model, split).value
        return replace(cls.estimate(memorisation(columns), privacy, utility, measured.seed), n=n)


def memorisation(columns: Columns) -> float:
    """Return the memorisation part of `Aggregate` from the measured columns of the forget rows; 1: nothing is left."""
    known_N = 1 / (1 + np.exp(measured_log_truth_ratios(columns)))
    paraphrase_N = np.exp(-columns["paraphrase_loss"])
    scores = (columns["extraction_strength"], columns["accuracy"], paraphrase_N, known_N)
    return float(harmonic(*(1 - score_N.mean() for score_N in scores)))


def _privacy(measured: MeasuredColumns, model: str, score: str) -> float:
    """Return `max(0, 1 - |AUC - AUC_retrained| / AUC_retrained)` of one membership score."""
    own, retrained = (_auc(*members_and_scores(measured, name, score)) for name in (model, RETRAINED))
    if retrained == 0:
        return float(own == 0)
    return max(0.0, 1 - abs(own - retrained) / retrained)


def _auc(member_N: NDArray, score_N: NDArray) -> float:
    return float(auc(score_N[member_N == 1], score_N[member_N == 0]))
