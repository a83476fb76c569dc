"""Metrics of content: the tokens that carry what was learned, apart from the others (`evaluation.content`)."""

from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike

from hf_unlearn.evaluation.metrics.base import EACH_SPLIT, NUMBER, MeasuredColumns, UnlearningMetric
from hf_unlearn.evaluation.metrics.intervals import Estimate, bootstrap_mean, undefined
from hf_unlearn.evaluation.metrics.registry import register_metric


@register_metric("content_loss", column="content_loss", count="content_tokens")
@register_metric("content_known", column="content_known", count="content_tokens")
@register_metric("function_loss", column="function_loss", count="function_tokens")
class ContentMean(UnlearningMetric):
    """Mean over rows of a score of `ContentScores`; rows without a token of its kind do not count.

    `content_loss` and `function_loss` are in nats, and `content_known` is the share of content tokens with a
    probability above one half.

    >>> ContentMean.estimate([0.5, 1.5]).value
    1.0
    """

    inputs = {"scores": NUMBER}
    needs = {EACH_SPLIT: ("content",)}
    column: ClassVar[str] = "content_loss"
    count: ClassVar[str] = "content_tokens"

    @staticmethod
    def estimate(scores: ArrayLike, seed: int = 0) -> Estimate:
        return bootstrap_mean(scores, seed)

    @classmethod
    def from_columns(cls, measured: MeasuredColumns, model: str, split: str) -> Estimate:
        columns = measured.of(model, split)
        scores = columns[cls.column][columns[cls.count] > 0]
        if not len(scores):
            return undefined(f"no row has {cls.count.replace('_', ' ')}")
        return cls.estimate(scores, measured.seed)


@register_metric("greedy_reveals")
class GreedyReveals(UnlearningMetric):
    """Share of forget rows whose greedy answer still has one of their content phrases (`evaluation.greedy`).

    >>> GreedyReveals.estimate([1.0, 0.0]).value
    0.5
    """

    inputs = {"reveals": NUMBER}
    needs = {"forget": ("greedy",)}

    @staticmethod
    def estimate(reveals: ArrayLike, seed: int = 0) -> Estimate:
        return bootstrap_mean(reveals, seed)

    @classmethod
    def from_columns(cls, measured: MeasuredColumns, model: str, split: str) -> Estimate:
        reveals = measured.of(model, split)["reveals"]
        asked = reveals[~np.isnan(reveals)]
        return cls.estimate(asked, measured.seed) if len(asked) else undefined("no row has content to ask for")
