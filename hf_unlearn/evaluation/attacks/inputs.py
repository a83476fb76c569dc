"""Attacks that leave the weights alone: other prompts, hidden states, membership. Shapes: B rows, T positions, D
features of a hidden state, N rows."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from hf_unlearn.data.wrong_answers import ALTERNATIVES
from hf_unlearn.evaluation.attacks.subject import NotRun, Outcome, Subject
from hf_unlearn.evaluation.metrics.intervals import auc, bootstrap_auc, bootstrap_mean, undefined
from hf_unlearn.evaluation.metrics.membership import ShadowAttack
from hf_unlearn.evaluation.row_scores import map_rows, score_classes
from hf_unlearn.models.tasks import IGNORED, context_length

FOLDS, FEWEST = 5, 4


def paraphrased_prompts(subject: Subject) -> Iterator[Outcome]:
    """Ask for the same answers in other words (TOFU's `paraphrased_question`)."""
    rows = [_other_question(row) for row in _all(subject.rows["forget"])]
    if not rows or None in rows:
        raise NotRun("the forget rows have no other wording; give raw rows with a column 'paraphrased_question'")
    yield Outcome(
        f"paraphrased_prompt_{subject.measure}", "forget", bootstrap_mean(subject.score(rows), subject.settings.seed)
    )


def _other_question(row: Mapping[str, Any]) -> Any:
    return (row.get(ALTERNATIVES) or {}).get("question")


def few_shot_prompts(subject: Subject) -> Iterator[Outcome]:
    """Show other rows with their answers before each forget row."""
    if subject.measure != "probability":
        raise NotRun("there is no prompt before the rows of a classifier")
    examples = _all(subject.split("retain", "holdout"))[: subject.settings.shots]
    shown = [int(token) for row in examples for token in row["input_ids"]]
    rows = [_after(shown, row) for row in _all(subject.rows["forget"])]
    longest = max(len(row["input_ids"]) for row in rows)
    context = context_length(subject.model)
    if context is not None and longest > context:
        raise NotRun(f"with {len(examples)} rows before it a row has {longest} tokens, the context is {context}")
    yield Outcome(
        f"few_shot_prompt_{subject.measure}", "forget", bootstrap_mean(subject.score(rows), subject.settings.seed)
    )


def _after(shown: Sequence[int], row: Mapping[str, Any]) -> dict[str, list[int]]:
    tokens, labels = [*shown, *row["input_ids"]], [IGNORED] * len(shown) + list(row["labels"])
    return {"input_ids": tokens, "attention_mask": [1] * len(tokens), "labels": labels}


def linear_probe(subject: Subject) -> Iterator[Outcome]:
    """Can a linear classifier tell forget from held-out rows by the hidden states?

    Logistic regression on each layer's mean state, judged on rows that it was not fitted on (five folds); the highest
    AUC of all layers counts. Forget and held-out rows may differ in what they are about: only the comparison with the
    retrained model says something.
    """
    parts = [subject.rows["forget"], subject.split("holdout", "test")]
    if min(map(len, parts)) < FEWEST:
        raise NotRun(f"it needs {FEWEST} forget and {FEWEST} held-out rows")
    states = [hidden_means(subject, rows) for rows in parts]
    member = np.repeat([1, 0], [len(part) for part in parts])
    folds = StratifiedKFold(min(FOLDS, *map(len, parts)), shuffle=True, random_state=subject.settings.seed)
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    best: tuple[float, NDArray] | None = None
    for layer in range(states[0].shape[1]):
        features_ND = np.concatenate([part[:, layer] for part in states])
        if not np.isfinite(features_ND).all():
            yield Outcome("probe_auc", "forget", undefined("a hidden state is not finite", len(member)))
            return
        score = cross_val_predict(probe, features_ND, member, cv=folds, method="decision_function")
        area = float(auc(score[member == 1], score[member == 0]))
        best = max(best or (area, score), (area, score), key=lambda pair: pair[0])
    assert best is not None
    score = best[1]
    yield Outcome("probe_auc", "forget", bootstrap_auc(score[member == 1], score[member == 0], subject.settings.seed))


def shadow_models(subject: Subject) -> Iterator[Outcome]:
    """Membership by what shadow models' outputs show (PGU, WACV 2024, section 4); see `ShadowAttack`."""
    if not subject.shadows:
        raise NotRun("no shadow models were given")
    if subject.measure != "accuracy":
        raise NotRun("it is an attack on classifiers")
    parts = [("forget", subject.model, subject.rows["forget"])]
    for shadow in subject.shadows:
        parts += [("shadow_member", shadow.model, shadow.members), ("shadow_other", shadow.model, shadow.others)]
    role: list[str] = []
    outputs, labels = [], []
    for name, model, rows in parts:
        outputs.append(score_classes(model, rows, subject.tools.collator, subject.tools.batch_size)[1])
        labels += [int(row.get("labels", row.get("label"))) for row in _all(rows)]
        role += [name] * len(rows)
    estimate = ShadowAttack.estimate(role, np.concatenate(outputs), labels, subject.settings.seed)
    yield Outcome("membership_shadow_models", "forget", estimate, "either")


def hidden_means(subject: Subject, rows: Any) -> NDArray:
    """`[N, layers, D]`: the hidden states after each layer, averaged over each row's unmasked positions."""
    device = next(subject.model.parameters()).device

    def means(part: Sequence[Any]) -> list[NDArray]:
        batch = {key: value.to(device) for key, value in subject.tools.collator(part).items() if key != "labels"}
        try:
            outputs = subject.model(**batch, output_hidden_states=True)
        except TypeError as error:
            raise NotRun("the model does not give its hidden states") from error
        states = getattr(outputs, "hidden_states", None)
        if not states or len({state.shape for state in states}) > 1 or states[0].ndim != 3:
            raise NotRun("the model does not give hidden states of one shape, positions by features")
        mask_BT = batch.get("attention_mask", torch.ones(states[0].shape[:2], device=device))
        return [_mean(torch.stack([state[row] for state in states]), mask_BT[row]) for row in range(len(part))]

    with torch.no_grad():
        return np.stack(map_rows(means, subject.model, rows, subject.tools.batch_size))


def _mean(states_LTD: Tensor, mask_T: Tensor) -> NDArray:
    weights_T = mask_T.to(states_LTD.dtype)
    return ((states_LTD * weights_T[:, None]).sum(1) / weights_T.sum()).double().cpu().numpy()


def _all(rows: Any) -> list[Any]:
    return [rows[i] for i in range(len(rows))]
