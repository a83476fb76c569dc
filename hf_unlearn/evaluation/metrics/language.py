"""Metrics of language models: TOFU (Maini et al., COLM 2024), MUSE (Shi et al., ICLR 2025) and OpenUnlearning's
aggregate (Dorna et al., 2025, arXiv 2506.12618).

Shapes: N rows. Losses are means over a row's label tokens, in nats, as `RowScores.loss`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from rouge_score import rouge_scorer
from scipy.special import logsumexp
from scipy.stats import ks_2samp

from hf_unlearn.errors import DataError
from hf_unlearn.evaluation.metrics.base import NUMBER, NUMBERS, TEXT, UnlearningMetric
from hf_unlearn.evaluation.metrics.intervals import Estimate, bootstrap, bootstrap_mean, undefined

UTILITY_SPLITS = ("retain", "real_authors", "world_facts")
UTILITY_PARTS = tuple(
    f"{split}/{part}" for split in UTILITY_SPLITS for part in ("probability", "rouge_l", "truth_ratio")
)
FEWEST_ROWS = 4  # two samples of three cannot differ at 5%: the test could only ever say that nothing is wrong


class RowMean(UnlearningMetric):
    """Mean over rows of one score of `RowScores`, such as `accuracy` (exact memorisation) or `extraction_strength`."""

    inputs = {"scores": NUMBER}

    @staticmethod
    def estimate(scores: ArrayLike, seed: int = 0) -> Estimate:
        return bootstrap_mean(scores, seed)


class Probability(UnlearningMetric):
    """Length-normalised probability of the answer, `exp(-loss)` (TOFU, 2.2)."""

    inputs = {"loss": NUMBER}

    @staticmethod
    def estimate(loss: ArrayLike, seed: int = 0) -> Estimate:
        return bootstrap_mean(np.exp(-np.asarray(loss, dtype=np.float64)), seed)


class MultipleChoiceProbability(UnlearningMetric):
    """Length-normalised probability of the right answer among all given ones, `p / (p + sum p_wrong)` (TOFU, 2.2)."""

    inputs = {"loss": NUMBER, "wrong_losses": NUMBERS}

    @staticmethod
    def estimate(loss: ArrayLike, wrong_losses: Sequence[ArrayLike], seed: int = 0) -> Estimate:
        return bootstrap_mean(choice_probabilities(loss, wrong_losses), seed)


def choice_probabilities(loss: ArrayLike, wrong_losses: Sequence[ArrayLike]) -> NDArray:
    """`[N]`: share of the right answer in the probabilities of all; from the losses, so that none underflows."""
    loss_N, wrong = _checked(loss, wrong_losses)
    return np.array(
        [np.exp(-right - logsumexp([-right, *-losses])) for right, losses in zip(loss_N, wrong, strict=True)]
    )


class TruthRatio(UnlearningMetric):
    """Truth ratio (TOFU, 2.2): probability of wrong answers over that of a paraphrase of the right one.

    `ratio = exp(-mean_j loss(wrong_j)) / exp(-loss(paraphrase))`: the geometric mean over wrong answers, which
    OpenUnlearning computes; `arithmetic=True` takes the paper's arithmetic mean of `exp(-loss(wrong_j))`. Reported is
    the mean of `min(ratio, 1 / ratio)` for forget rows (1: right and wrong are equally likely) and of
    `max(0, 1 - ratio)` for others with `forget=False` (1: wrong answers are impossible). It is computed from losses;
    OpenUnlearning adds 1e-10 to each denominator, which drives ratios of answers below that probability to 0.
    """

    inputs = {"paraphrase_loss": NUMBER, "wrong_losses": NUMBERS}

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


def log_truth_ratios(
    paraphrase_loss: ArrayLike, wrong_losses: Sequence[ArrayLike], arithmetic: bool = False
) -> NDArray:
    """`[N]`: natural logarithm of each row's truth ratio.

    Raises:
        DataError: A row without a wrong answer, or columns of different lengths.
    """
    loss_N, wrong = _checked(paraphrase_loss, wrong_losses)
    mean = _log_mean_exp if arithmetic else np.mean
    return np.array([mean(-losses) for losses in wrong], dtype=np.float64) + loss_N


def truth_scores(log_ratio_N: NDArray, forget: bool) -> NDArray:
    """`[N]`: `min(ratio, 1 / ratio)` of forget rows, `max(0, 1 - ratio)` of others."""
    return np.exp(-np.abs(log_ratio_N)) if forget else np.maximum(0, -np.expm1(np.minimum(log_ratio_N, 0)))


def _log_mean_exp(values: NDArray) -> Any:
    return logsumexp(values) - np.log(len(values))


def _checked(loss: ArrayLike, wrong_losses: Sequence[ArrayLike]) -> tuple[NDArray, list[NDArray]]:
    loss_N, wrong = np.asarray(loss, dtype=np.float64), [np.asarray(w, dtype=np.float64) for w in wrong_losses]
    if len(loss_N) != len(wrong):
        raise DataError(f"{len(loss_N)} right answers come with wrong ones for {len(wrong)} rows; give one list a row")
    for row, losses in enumerate(wrong):
        if not losses.size:
            raise DataError(f"row {row} has no wrong answer to compare with; leave it out, or give it one")
    return loss_N, wrong


class ForgetQuality(UnlearningMetric):
    """P-value of the two-sided two-sample Kolmogorov-Smirnov test between the truth ratios of the unlearned and of the
    retrained model on the forget rows (TOFU, 2.2): near 1 they cannot be told apart, below 0.05 they differ.

    Any increasing function of the ratios gives the same value. Undefined without a retrained model, and on fewer than
    4 rows, where no difference could show. A p-value has no bootstrap interval: a resample repeats rows.
    """

    inputs = {"truth_ratio": NUMBER, "retrained_truth_ratio": NUMBER}

    @staticmethod
    def estimate(truth_ratio: ArrayLike, retrained_truth_ratio: ArrayLike | None, seed: int = 0) -> Estimate:
        ratio_N = np.asarray(truth_ratio, dtype=np.float64)
        if retrained_truth_ratio is None:
            return undefined("no retrained model was given", len(ratio_N))
        retrained_N = np.asarray(retrained_truth_ratio, dtype=np.float64)
        n = min(len(ratio_N), len(retrained_N))
        if n < FEWEST_ROWS:
            return undefined(f"a test on {n} rows can show no difference; it needs {FEWEST_ROWS}", n)
        if np.isnan(ratio_N).any() or np.isnan(retrained_N).any():
            return undefined("a truth ratio is not a number", n)
        return Estimate(float(ks_2samp(ratio_N, retrained_N).pvalue), None, None, n)


class HarmonicMean(UnlearningMetric):
    """Harmonic mean over groups of the mean score of each group's rows; 0 where one of them is 0."""

    inputs = {"group": TEXT, "score": NUMBER}

    @staticmethod
    def estimate(group: Sequence[str], score: ArrayLike, seed: int = 0) -> Estimate:
        score_N, names = np.asarray(score, dtype=np.float64), np.asarray(group)
        return harmonic_mean({str(name): score_N[names == name] for name in dict.fromkeys(names)}, seed)


class ModelUtility(HarmonicMean):
    """Harmonic mean of nine (TOFU, 2.2): probability, ROUGE-L recall and truth ratio on the retain set, on real authors
    and on world facts; probability is among the multiple choices on the latter two.

    The column `group` holds `UTILITY_PARTS`: `retain/probability`, ...; all nine are needed.
    """

    @staticmethod
    def estimate(group: Sequence[str], score: ArrayLike, seed: int = 0) -> Estimate:
        if wrong := sorted(set(UTILITY_PARTS) ^ set(group)):
            raise DataError(f"model utility is made of nine parts; missing or unknown: {', '.join(wrong)}")
        return HarmonicMean.estimate(group, score, seed)


def harmonic_mean(groups: Mapping[str, ArrayLike], seed: int = 0) -> Estimate:
    """Harmonic mean of the groups' means, each group resampled on its own."""
    return bootstrap(list(groups.values()), lambda *means, axis: harmonic(*(m.mean(axis=axis) for m in means)), seed)


def harmonic(*values: ArrayLike) -> Any:
    """Harmonic mean of non-negative values, element by element; 0 where one is 0."""
    stacked = np.stack([np.asarray(value, dtype=np.float64) for value in values])
    with np.errstate(divide="ignore"):
        return len(stacked) / (1 / stacked).sum(axis=0)


class RougeL(UnlearningMetric):
    """ROUGE-L recall of generated answers against true ones, with Porter's stemmer (TOFU, 2.2).

    `measure="fmeasure"` gives the F1 that MUSE's code reports as verbatim memorisation (a continuation of 128 tokens)
    and knowledge memorisation (an answer of 32 tokens), there with `stemmer=False`.
    """

    inputs = {"predictions": TEXT, "references": TEXT}

    @staticmethod
    def estimate(
        predictions: Sequence[str],
        references: Sequence[str],
        measure: str = "recall",
        stemmer: bool = True,
        seed: int = 0,
    ) -> Estimate:
        return bootstrap_mean(rouge_l(predictions, references, measure, stemmer), seed)


def rouge_l(
    predictions: Sequence[str], references: Sequence[str], measure: str = "recall", stemmer: bool = True
) -> NDArray:
    """`[N]`: ROUGE-L `recall`, `precision` or `fmeasure` of each row."""
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=stemmer)
    pairs = zip(predictions, references, strict=True)
    return np.array([getattr(scorer.score(true, found)["rougeL"], measure) for found, true in pairs], dtype=np.float64)
