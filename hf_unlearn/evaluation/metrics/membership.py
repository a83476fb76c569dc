"""Membership inference: can rows that were trained on be told from rows that never were?

Shapes: N rows, C classes. Scores of `MembershipAUC` are higher for rows that look like members.
"""

from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

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
from hf_unlearn.evaluation.metrics.intervals import (
    NO_RETRAINED,
    Estimate,
    auc,
    bootstrap,
    bootstrap_auc,
    bootstrap_mean,
    undefined,
)
from hf_unlearn.evaluation.metrics.registry import register_metric

ROLES = {"retain": "retain", "test": TEST, "forget": "forget"}
"""The split of each role in the attack that trains a classifier, and in the metrics of a classifier's rates."""

LOWER_FOR_MEMBERS: dict[str, Callable[[Columns, Columns | None], NDArray]] = {
    "loss": lambda columns, _: columns["loss"],
    "min_k": lambda columns, _: columns["min_k"],
    "min_k_plus_plus": lambda columns, _: columns["min_k_plus_plus"],
    "zlib": lambda columns, _: columns["loss"] / columns["compressed"],
    "reference": lambda columns, reference: columns["loss"] - _required(reference)["loss"],
    "gradient_norm": lambda columns, _: columns["gradient_norm"],
}
"""Scores of each row, lower for members, from its columns under the model and under the retrained model."""


def _required(columns: Columns | None) -> Columns:
    assert columns is not None, "the reference attack needs the retrained model's columns"
    return columns


def members_and_scores(measured: MeasuredColumns, model: str, score: str) -> tuple[NDArray, NDArray]:
    """Return whether each forget and test row is a member (1 or 0), and its score, which is higher for members."""
    scores = []
    for split in ("forget", TEST):
        reference = measured.of(RETRAINED, split) if measured.has_retrained else None
        scores.append(-LOWER_FOR_MEMBERS[score](measured.of(model, split), reference))
    return np.repeat([1.0, 0.0], [len(score_N) for score_N in scores]), np.concatenate(scores)


@register_metric("membership_auc")
@register_metric("membership_auc_reference", score="reference", against_retrained=True)
@register_metric("membership_auc_zlib", score="zlib", needs=dict.fromkeys(("forget", TEST), ("rows", "texts")))
@register_metric("membership_auc_min_k", score="min_k")
@register_metric("membership_auc_min_k_plus_plus", score="min_k_plus_plus")
@register_metric(
    "membership_auc_gradient_norm", score="gradient_norm", needs=dict.fromkeys(("forget", TEST), ("gradients",))
)
class MembershipAUC(UnlearningMetric):
    """Area under the ROC curve of members' scores against others'; 0.5: they cannot be told apart.

    Scores are higher for members: minus the loss (Yeom et al., CSF 2018); minus the loss relative to that of a
    reference model, or to the zlib-compressed length of the text (Carlini et al., USENIX Security 2021); minus `min_k`
    or `min_k_plus_plus` of `RowScores`; minus the norm of the gradient. `member` is 1 or 0. From measured columns,
    forget rows are members, test or held-out rows are not, and the retrained model is the reference.

    >>> MembershipAUC.estimate([1, 1, 0, 0], [0.9, 0.4, 0.5, 0.1]).value
    0.75
    """

    inputs = {"member": NUMBER, "score": NUMBER}
    needs = {"forget": ROWS, TEST: ROWS}
    score: ClassVar[str] = "loss"

    @staticmethod
    def estimate(member: ArrayLike, score: ArrayLike, seed: int = 0) -> Estimate:
        score_N, member_N = np.asarray(score, dtype=np.float64), np.asarray(member) == 1
        return bootstrap_auc(score_N[member_N], score_N[~member_N], seed)

    @classmethod
    def from_columns(cls, measured: MeasuredColumns, model: str, split: str) -> Estimate:
        if cls.score == "reference" and not measured.has_retrained:
            n = sum(len(measured.of(model, name)["loss"]) for name in cls.needs)
            return undefined("the reference attack compares with the retrained model, and none was given", n)
        return cls.estimate(*members_and_scores(measured, model, cls.score), measured.seed)


@register_metric("priv_leak")
class PrivLeak(UnlearningMetric):
    """PrivLeak (MUSE, 2.2): `100 * ((1 - AUC) - (1 - AUC_retrained)) / (1 - AUC_retrained)`, where AUC is that of
    forget rows against held-out rows by min-k. 0: as private as the retrained model; negative: under-unlearned;
    positive: over-unlearned.

    It is undefined without a retrained model, and if the retrained model tells the rows apart perfectly.

    >>> PrivLeak.estimate([1, 1, 0, 0], [0.9, 0.4, 0.5, 0.1], [0.9, 0.4, 0.5, 0.1]).value
    0.0
    """

    inputs = {"member": NUMBER, "score": NUMBER, "retrained_score": NUMBER}
    needs = {"forget": ROWS, TEST: ROWS}
    against_retrained = True

    @staticmethod
    def estimate(member: ArrayLike, score: ArrayLike, retrained_score: ArrayLike | None, seed: int = 0) -> Estimate:
        member_N = np.asarray(member) == 1
        if retrained_score is None:
            return undefined(NO_RETRAINED, len(member_N))
        both_2N = np.stack([np.asarray(score, dtype=np.float64), np.asarray(retrained_score, dtype=np.float64)])
        samples = (both_2N[:, member_N], both_2N[:, ~member_N])
        if all(s.shape[1] for s in samples) and auc(samples[0][1], samples[1][1]) == 1:
            return undefined("the retrained model tells forget from held-out rows perfectly", len(member_N))
        return bootstrap(samples, _priv_leak, seed)

    @classmethod
    def from_columns(cls, measured: MeasuredColumns, model: str, split: str) -> Estimate:
        member_N, score_N = members_and_scores(measured, model, "min_k")
        retrained_N = members_and_scores(measured, RETRAINED, "min_k")[1] if measured.has_retrained else None
        return cls.estimate(member_N, score_N, retrained_N, measured.seed)


def _priv_leak(members_2N: NDArray, others_2N: NDArray, axis: int) -> NDArray:
    left, right = (1 - auc(members_2N[i], others_2N[i], axis) for i in range(2))
    with np.errstate(divide="ignore", invalid="ignore"):
        return 100 * (left - right) / right


@register_metric("membership_efficacy")
@register_metric("membership_efficacy_entropy", feature="entropy")
class MembershipEfficacy(UnlearningMetric):
    """MIA-efficacy (Jia et al., NeurIPS 2023): share of forget rows that a classifier takes for never seen.

    Logistic regression with balanced classes is trained to tell `retain` from `test` rows (the column `role`) by one
    output feature, the confidence in the true class or the entropy, and applied to the `forget` rows; public ports fit
    a support vector machine to subsamples of equal size. The interval is over forget rows with the classifier held
    fixed. It is undefined if a role has no rows.

    >>> role = ["retain"] * 2 + ["test"] * 2 + ["forget"] * 2
    >>> MembershipEfficacy.estimate(role, [0.9, 0.8, 0.3, 0.2, 0.1, 0.95]).value
    0.5
    """

    inputs = {"role": TEXT, "feature": NUMBER}
    needs = dict.fromkeys(("forget", "retain", TEST), ROWS)
    feature: ClassVar[str] = "probability"

    @staticmethod
    def estimate(role: Sequence[str], feature: ArrayLike, seed: int = 0) -> Estimate:
        roles, feature_N = np.asarray(role), np.asarray(feature, dtype=np.float64)
        retain, test, forget = (feature_N[roles == name] for name in ("retain", "test", "forget"))
        if not all(map(len, (retain, test, forget))):
            return undefined("it needs retain, test and forget rows", len(forget))
        if not np.isfinite(feature_N).all():
            return undefined("a feature is not finite", len(forget))
        return bootstrap_mean(never_seen(retain, test, forget), seed)

    @classmethod
    def from_columns(cls, measured: MeasuredColumns, model: str, split: str) -> Estimate:
        features = {role: measured.of(model, role_split)[cls.feature] for role, role_split in ROLES.items()}
        return cls.estimate(*grouped_columns(features), measured.seed)


def never_seen(retain: NDArray, test: NDArray, forget: NDArray) -> NDArray:
    """Return 1 for each forget row that a classifier of retain against test rows takes for a test row, else 0: `[N]`.

    Each argument is `[rows]` or `[rows, features]`.
    """
    retain, test, forget = (np.reshape(rows, (len(rows), -1)) for rows in (retain, test, forget))
    classifier = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    classifier.fit(np.concatenate([retain, test]), np.repeat([0, 1], [len(retain), len(test)]))
    return classifier.predict(forget).astype(np.float64)


class ShadowAttack(UnlearningMetric):
    """PGU's attack (WACV 2024, section 4; Shokri et al., S&P 2017): share of forget rows taken for unseen.

    Gradient-boosted trees learn from the softmax outputs and labels of shadow models which rows those models were
    trained on (the column `role`: `shadow_member`, `shadow_other`), and classify the `forget` rows of the audited
    model. It needs shadow models, so it belongs to an audit and is not registered as a metric.
    """

    inputs = {"role": TEXT, "probabilities": NUMBERS, "label": NUMBER}

    @staticmethod
    def estimate(role: Sequence[str], probabilities: ArrayLike, label: ArrayLike, seed: int = 0) -> Estimate:
        roles = np.asarray(role)
        features = np.column_stack([np.asarray(probabilities, dtype=np.float64), np.asarray(label, dtype=np.float64)])
        shadow, forget = np.isin(roles, ("shadow_member", "shadow_other")), roles == "forget"
        if len(set(roles[shadow])) < 2 or not forget.any():
            return undefined("it needs shadow rows of both kinds and forget rows", int(forget.sum()))
        trees = HistGradientBoostingClassifier(random_state=seed)
        trees.fit(features[shadow], roles[shadow] == "shadow_other")
        return bootstrap_mean(trees.predict(features[forget]), seed)
