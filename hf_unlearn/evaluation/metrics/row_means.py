"""Metrics that are the mean over rows of one column of `RowScores`."""

from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from hf_unlearn.evaluation.metrics.base import NUMBER, MeasuredColumns, UnlearningMetric
from hf_unlearn.evaluation.metrics.intervals import Estimate, bootstrap_mean
from hf_unlearn.evaluation.metrics.registry import register_metric


@register_metric("accuracy", column="accuracy")
@register_metric("loss", column="loss")
@register_metric("entropy", column="entropy")
@register_metric("exact_memorisation", column="accuracy")
@register_metric("extraction_strength", column="extraction_strength")
class RowMean(UnlearningMetric):
    """Mean over rows of one score of `RowScores`, such as `accuracy` (for answers: exact memorisation).

    >>> RowMean.estimate([0.0, 1.0, 1.0, 1.0]).value
    0.75
    """

    inputs = {"scores": NUMBER}
    column: ClassVar[str]

    @staticmethod
    def estimate(scores: ArrayLike, seed: int = 0) -> Estimate:
        return bootstrap_mean(scores, seed)

    @classmethod
    def from_columns(cls, measured: MeasuredColumns, model: str, split: str) -> Estimate:
        return cls.estimate(measured.of(model, split)[cls.column], measured.seed)


@register_metric("answer_probability")
class Probability(UnlearningMetric):
    """Length-normalised probability of the answer, `exp(-loss)` (TOFU, 2.2)."""

    inputs = {"loss": NUMBER}

    @staticmethod
    def estimate(loss: ArrayLike, seed: int = 0) -> Estimate:
        return bootstrap_mean(np.exp(-np.asarray(loss, dtype=np.float64)), seed)

    @classmethod
    def from_columns(cls, measured: MeasuredColumns, model: str, split: str) -> Estimate:
        return bootstrap_mean(measured.of(model, split)["probability"], measured.seed)
