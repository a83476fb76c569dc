"""Metrics of answers: TOFU (Maini et al., COLM 2024) and MUSE (Shi et al., ICLR 2025).

Shapes: N rows. Losses are means over a row's label tokens, in nats, as `RowScores.loss`.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import logsumexp
from scipy.stats import ks_2samp

from hf_unlearn.errors import DataError
from hf_unlearn.evaluation.generation import rouge_l
from hf_unlearn.evaluation.measurements import Columns, wrong_losses
from hf_unlearn.evaluation.metrics.base import (
    EACH_SPLIT,
    NUMBER,
    NUMBERS,
    RETRAINED,
    TEXT,
    MeasuredColumns,
    UnlearningMetric,
)
from hf_unlearn.evaluation.metrics.intervals import NO_RETRAINED, Estimate, bootstrap_mean, undefined
from hf_unlearn.evaluation.metrics.registry import register_metric

FEWEST_ROWS = 4  # two samples of three cannot differ at 5%, so the test could never reject


@register_metric("multiple_choice_probability")
class MultipleChoiceProbability(UnlearningMetric):
    """Length-normalised probability of the right answer among all given ones, `p / (p + sum p_wrong)` (TOFU, 2.2).

    >>> round(MultipleChoiceProbability.estimate([0.0], [[0.0, 0.0]]).value, 3)
    0.333
    """

    inputs = {"loss": NUMBER, "wrong_losses": NUMBERS}
    needs = {EACH_SPLIT: ("rows", "alternatives")}

    @staticmethod
    def estimate(loss: ArrayLike, wrong_losses: Sequence[ArrayLike], seed: int = 0) -> Estimate:
        return bootstrap_mean(choice_probabilities(loss, wrong_losses), seed)

    @classmethod
    def from_columns(cls, measured: MeasuredColumns, model: str, split: str) -> Estimate:
        columns = measured.of(model, split)
        return cls.estimate(columns["loss"], wrong_losses(columns), measured.seed)


def choice_probabilities(loss: ArrayLike, wrong_losses: Sequence[ArrayLike]) -> NDArray:
    """Return the share of the right answer in the probabilities of all answers: `[N]`.

    It is computed from the losses, so that no probability underflows.
    """
    loss_N, wrong = _checked(loss, wrong_losses)
    return np.array(
        [np.exp(-right - logsumexp([-right, *-losses])) for right, losses in zip(loss_N, wrong, strict=True)]
    )


@register_metric("truth_ratio")
@register_metric("truth_ratio_arithmetic", arithmetic=True)
class TruthRatio(UnlearningMetric):
    """Truth ratio (TOFU, 2.2): probability of wrong answers over the probability of a paraphrase of the right one.

    `ratio = exp(-mean_j loss(wrong_j)) / exp(-loss(paraphrase))`: the geometric mean over wrong answers, as in
    OpenUnlearning; `arithmetic=True` takes the paper's arithmetic mean of `exp(-loss(wrong_j))`. The value is the mean
    of `min(ratio, 1 / ratio)` for forget rows (1: right and wrong are equally likely) and the mean of
    `max(0, 1 - ratio)` for other rows with `forget=False` (1: wrong answers are impossible). Ratios are computed from
    losses; OpenUnlearning adds 1e-10 to each denominator, which drives ratios of answers below that probability to 0.

    >>> TruthRatio.estimate([1.0, 2.0], [[1.0], [2.0]]).value
    1.0
    """

    inputs = {"paraphrase_loss": NUMBER, "wrong_losses": NUMBERS}
    needs = {EACH_SPLIT: ("alternatives",)}
    arithmetic: ClassVar[bool] = False

    @staticmethod
    def estimate(
        paraphrase_loss: ArrayLike,
        wrong_losses: Sequence[ArrayLike],
        forget: bool = True,
        arithmetic: bool = False,
        seed: int = 0,
    ) -> Estimate:
        log_N = log_truth_ratios(paraphrase_loss, wrong_losses, arithmetic)
        return bootstrap_mean(truth_scores(log_N, forget), seed)

    @classmethod
    def from_columns(cls, measured: MeasuredColumns, model: str, split: str) -> Estimate:
        columns, forget = measured.of(model, split), split.startswith("forget")
        return cls.estimate(
            columns["paraphrase_loss"], wrong_losses(columns), forget, cls.arithmetic, seed=measured.seed
        )


def log_truth_ratios(
    paraphrase_loss: ArrayLike, wrong_losses: Sequence[ArrayLike], arithmetic: bool = False
) -> NDArray:
    """Return the natural logarithm of each row's truth ratio: `[N]`.

    Raises:
        DataError: A row has no wrong answer, or the columns have different lengths.
    """
    loss_N, wrong = _checked(paraphrase_loss, wrong_losses)
    mean: Callable[[NDArray], float] = _log_mean_exp if arithmetic else np.mean
    return np.array([mean(-losses) for losses in wrong], dtype=np.float64) + loss_N


def measured_log_truth_ratios(columns: Columns) -> NDArray:
    """Return `log_truth_ratios` of the columns of the measurement `alternatives`: `[N]`."""
    return log_truth_ratios(columns["paraphrase_loss"], wrong_losses(columns))


def truth_scores(log_ratio_N: NDArray, forget: bool) -> NDArray:
    """Return `min(ratio, 1 / ratio)` for forget rows and `max(0, 1 - ratio)` for others: `[N]`."""
    return np.exp(-np.abs(log_ratio_N)) if forget else np.maximum(0, -np.expm1(np.minimum(log_ratio_N, 0)))


def _log_mean_exp(values: NDArray) -> float:
    return float(logsumexp(values) - np.log(len(values)))


def _checked(loss: ArrayLike, wrong_losses: Sequence[ArrayLike]) -> tuple[NDArray, list[NDArray]]:
    loss_N, wrong = np.asarray(loss, dtype=np.float64), [np.asarray(w, dtype=np.float64) for w in wrong_losses]
    if len(loss_N) != len(wrong):
        raise DataError(
            f"{len(loss_N)} right answers come with wrong answers for {len(wrong)} rows; give one list per row"
        )
    for row, losses in enumerate(wrong):
        if not losses.size:
            raise DataError(f"row {row} has no wrong answer to compare with; add one, or leave the row out")
    return loss_N, wrong


@register_metric("forget_quality")
class ForgetQuality(UnlearningMetric):
    """P-value of the two-sided two-sample Kolmogorov-Smirnov test between the truth ratios of the unlearned and of the
    retrained model on the forget rows (TOFU, 2.2): near 1 they cannot be told apart, below 0.05 they differ.

    Any increasing function of the ratios gives the same value. It is undefined without a retrained model, and on fewer
    than 4 rows, where the test could not reject. A p-value has no bootstrap interval, because a resample repeats rows.

    >>> ForgetQuality.estimate([1, 2, 3, 4], [1, 2, 3, 4]).value
    1.0
    """

    inputs = {"truth_ratio": NUMBER, "retrained_truth_ratio": NUMBER}
    needs = {"forget": ("alternatives",)}
    against_retrained = True

    @staticmethod
    def estimate(truth_ratio: ArrayLike, retrained_truth_ratio: ArrayLike | None, seed: int = 0) -> Estimate:
        ratio_N = np.asarray(truth_ratio, dtype=np.float64)
        if retrained_truth_ratio is None:
            return undefined(NO_RETRAINED, len(ratio_N))
        retrained_N = np.asarray(retrained_truth_ratio, dtype=np.float64)
        n = min(len(ratio_N), len(retrained_N))
        if n < FEWEST_ROWS:
            return undefined(f"a test on {n} rows can show no difference; it needs {FEWEST_ROWS}", n)
        if np.isnan(ratio_N).any() or np.isnan(retrained_N).any():
            return undefined("a truth ratio is not a number", n)
        return Estimate(float(ks_2samp(ratio_N, retrained_N).pvalue), None, None, n)

    @classmethod
    def from_columns(cls, measured: MeasuredColumns, model: str, split: str) -> Estimate:
        retrained = measured_log_truth_ratios(measured.of(RETRAINED, split)) if measured.has_retrained else None
        return cls.estimate(measured_log_truth_ratios(measured.of(model, split)), retrained, measured.seed)


@register_metric("rouge_l")
@register_metric(
    "verbatim_memorisation", column="rouge_l_fmeasure_128", needs={"forget_verbmem|forget": ("continuations",)}
)
@register_metric(
    "knowledge_memorisation", column="rouge_l_fmeasure_32", needs={"forget_knowmem|forget": ("short_answers",)}
)
@register_metric("knowledge_utility", column="rouge_l_fmeasure_32", needs={"retain_knowmem|retain": ("short_answers",)})
class RougeL(UnlearningMetric):
    """ROUGE-L recall of generated answers against true ones, with Porter's stemmer (TOFU, 2.2).

    `measure="fmeasure"` gives the F1 that MUSE's code reports as verbatim memorisation (a continuation of 128 tokens)
    and knowledge memorisation (an answer of 32 tokens), both with `stemmer=False`.

    >>> RougeL.estimate(["he is a baker"], ["he is a painter"]).value
    0.75
    """

    inputs = {"predictions": TEXT, "references": TEXT}
    needs = {EACH_SPLIT: ("answers",)}
    column: ClassVar[str] = "rouge_l_recall_200"

    @staticmethod
    def estimate(
        predictions: Sequence[str],
        references: Sequence[str],
        measure: str = "recall",
        stemmer: bool = True,
        seed: int = 0,
    ) -> Estimate:
        return bootstrap_mean(rouge_l(predictions, references, measure, stemmer), seed)

    @classmethod
    def from_columns(cls, measured: MeasuredColumns, model: str, split: str) -> Estimate:
        return bootstrap_mean(measured.of(model, split)[cls.column], measured.seed)
