"""Membership inference: can rows that were trained on be told from rows that never were?

Shapes: N rows, C classes. Scores of `MembershipAUC` are higher for rows that look like members.
"""

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from hf_unlearn.core.sharding import require_whole
from hf_unlearn.evaluation.metrics.base import NUMBER, NUMBERS, TEXT, UnlearningMetric
from hf_unlearn.evaluation.metrics.intervals import Estimate, auc, bootstrap, bootstrap_auc, bootstrap_mean, undefined
from hf_unlearn.evaluation.row_scores import map_rows
from hf_unlearn.models.forward import predict
from hf_unlearn.models.tasks import Collator


class MembershipAUC(UnlearningMetric):
    """Area under the ROC curve of members' scores against others'; 0.5: they cannot be told apart.

    Scores are higher for members: minus the loss (Yeom et al., CSF 2018); minus the loss relative to a reference
    model's, or to the zlib-compressed length of the text (Carlini et al., USENIX Security 2021); minus `min_k` or
    `min_k_plus_plus` of `RowScores`; minus the norm of the gradient. `member` is 1 or 0.
    """

    inputs = {"member": NUMBER, "score": NUMBER}

    @staticmethod
    def estimate(member: ArrayLike, score: ArrayLike, seed: int = 0) -> Estimate:
        score_N, member_N = np.asarray(score, dtype=np.float64), np.asarray(member) == 1
        return bootstrap_auc(score_N[member_N], score_N[~member_N], seed)


class PrivLeak(UnlearningMetric):
    """PrivLeak (MUSE, 2.2): `100 * ((1 - AUC) - (1 - AUC_retrained)) / (1 - AUC_retrained)`, with the AUC of forget
    rows against held-out ones by min-k. 0: as private as the retrained model; below it under-, above over-unlearned.

    Undefined without a retrained model, and where the retrained model itself tells the rows apart perfectly.
    """

    inputs = {"member": NUMBER, "score": NUMBER, "retrained_score": NUMBER}

    @staticmethod
    def estimate(member: ArrayLike, score: ArrayLike, retrained_score: ArrayLike | None, seed: int = 0) -> Estimate:
        member_N = np.asarray(member) == 1
        if retrained_score is None:
            return undefined("no retrained model was given", len(member_N))
        both_2N = np.stack([np.asarray(score, dtype=np.float64), np.asarray(retrained_score, dtype=np.float64)])
        samples = (both_2N[:, member_N], both_2N[:, ~member_N])
        if all(s.shape[1] for s in samples) and auc(samples[0][1], samples[1][1]) == 1:
            return undefined("the retrained model tells forget from held-out rows perfectly", len(member_N))
        return bootstrap(samples, _priv_leak, seed)


def _priv_leak(members_2N: NDArray, others_2N: NDArray, axis: int) -> Any:
    left, right = (1 - auc(members_2N[i], others_2N[i], axis) for i in range(2))
    with np.errstate(divide="ignore", invalid="ignore"):
        return 100 * (left - right) / right


class MembershipEfficacy(UnlearningMetric):
    """MIA-efficacy (Jia et al., NeurIPS 2023): share of forget rows that a classifier takes for never seen.

    Logistic regression, with balanced classes, is trained to tell `retain` from `test` rows (the column `role`) by one
    output feature, confidence in the true class or entropy, and applied to the `forget` rows; public ports fit a
    support vector machine to subsamples of equal size. The interval is over forget rows, with the classifier as it is.
    Undefined where a role has no rows.
    """

    inputs = {"role": TEXT, "feature": NUMBER}

    @staticmethod
    def estimate(role: Sequence[str], feature: ArrayLike, seed: int = 0) -> Estimate:
        roles, feature_N = np.asarray(role), np.asarray(feature, dtype=np.float64)
        parts = [feature_N[roles == name] for name in ("retain", "test", "forget")]
        if not all(map(len, parts)):
            return undefined("it needs retain, test and forget rows", len(parts[2]))
        if not np.isfinite(feature_N).all():
            return undefined("a feature is not finite", len(parts[2]))
        return bootstrap_mean(never_seen(*parts), seed)


def never_seen(retain: NDArray, test: NDArray, forget: NDArray) -> NDArray:
    """`[N]` of the forget rows: 1 where a classifier of retain against test rows says test, else 0.

    Each is `[rows]` or `[rows, features]`.
    """
    retain, test, forget = (np.reshape(part, (len(part), -1)) for part in (retain, test, forget))
    classifier = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    classifier.fit(np.concatenate([retain, test]), np.repeat([0, 1], [len(retain), len(test)]))
    return classifier.predict(forget).astype(np.float64)


class ShadowAttack(UnlearningMetric):
    """The seed's attack (PGU, WACV 2024, section 4; Shokri et al., S&P 2017): share of forget rows taken for unseen.

    Gradient-boosted trees learn, from the softmax outputs and labels of shadow models, which rows those models were
    trained on (the column `role`: `shadow_member`, `shadow_other`), and judge the `forget` rows of the model at hand.
    """

    inputs = {"role": TEXT, "probabilities": NUMBERS, "label": NUMBER}

    @staticmethod
    def estimate(role: Sequence[str], probabilities: Any, label: ArrayLike, seed: int = 0) -> Estimate:
        roles = np.asarray(role)
        features = np.column_stack([np.asarray(probabilities, dtype=np.float64), np.asarray(label, dtype=np.float64)])
        shadow, forget = np.isin(roles, ("shadow_member", "shadow_other")), roles == "forget"
        if len(set(roles[shadow])) < 2 or not forget.any():
            return undefined("it needs shadow rows of both kinds and forget rows", int(forget.sum()))
        trees = HistGradientBoostingClassifier(random_state=seed)
        trees.fit(features[shadow], roles[shadow] == "shadow_other")
        return bootstrap_mean(trees.predict(features[forget]), seed)


def compressed_lengths(texts: Sequence[str]) -> NDArray:
    """`[N]`: bytes of each text after zlib."""
    return np.array([len(zlib.compress(text.encode("utf-8"))) for text in texts], dtype=np.float64)


def gradient_norms(model: nn.Module, dataset: Any, collator: Collator) -> NDArray:
    """`[N]`: L2 norm of each row's loss gradient over all weights (Wang et al., 2024, arXiv 2402.17012).

    In eval mode, row by row; gradients and `requires_grad` come back as they were. OpenUnlearning averages the norms of
    the single parameters, in training mode, so that dropout adds noise.

    Raises:
        ModelError: The weights are sharded over processes.
    """
    require_whole(model, "the gradient-norm attack")
    weights = [p for p in model.parameters() if p.is_floating_point()]
    before = [(p.requires_grad, p.grad) for p in weights]
    device = next(model.parameters()).device

    def norm(rows: Sequence[Any]) -> list[float]:
        for weight in weights:
            weight.grad = None
        batch = {key: value.to(device) for key, value in collator(rows).items()}
        with torch.enable_grad():
            predict(model, batch).nll_L.mean().backward()
        norms = [torch.linalg.vector_norm(w.grad.float()) for w in weights if w.grad is not None]
        return [float(torch.linalg.vector_norm(torch.stack(norms)))]

    try:
        for weight in weights:
            weight.requires_grad_(True)
        return np.array(map_rows(norm, model, dataset, 1), dtype=np.float64)
    finally:
        for weight, (required, grad) in zip(weights, before, strict=True):
            weight.grad = None
            weight.requires_grad_(required)
            weight.grad = grad
