"""Attacks that ask of each row whether the model was trained on it."""

from collections.abc import Iterator

import numpy as np

from hf_unlearn.evaluation.attacks.registry import register_attack
from hf_unlearn.evaluation.attacks.subject import Memory, NotRun, Outcome, Skipped, Subject
from hf_unlearn.evaluation.metrics.base import RETRAINED, MeasuredColumns
from hf_unlearn.evaluation.metrics.membership import ShadowAttack
from hf_unlearn.evaluation.metrics.registry import (
    METRICS,
    SUITES,
    estimate_metrics,
    missing_splits,
    wanted_measurements,
)
from hf_unlearn.evaluation.row_scores import score_classes

MEMBERSHIP_METRICS = (*SUITES["attacks"], "membership_efficacy")
TEXT_SCORES = ("membership_auc_zlib", "membership_auc_min_k", "membership_auc_min_k_plus_plus")


@register_attack("membership")
def membership(subject: Subject) -> Iterator[Outcome | Skipped]:
    """Tell forget from held-out rows by six scores, and by a classifier that was trained on retain and held-out rows.

    The numbers are the metrics of the suite `attacks` and `membership_efficacy`.
    """
    names = []
    for name in MEMBERSHIP_METRICS:
        if METRICS[name].against_retrained and subject.name == RETRAINED:
            continue
        reason = _reason_to_skip(name, subject)
        if reason:
            yield Skipped(name, reason)
        else:
            names.append(name)
    columns = {subject.name: subject.columns(wanted_measurements(names, subject.rows))}
    comparing = [name for name in names if METRICS[name].against_retrained]
    if comparing and subject.retrained is not None:
        columns[RETRAINED] = subject.retrained.columns(wanted_measurements(comparing, subject.rows))
    measured = MeasuredColumns(columns, subject.settings.seed)
    for name, split, estimate in estimate_metrics(names, measured, subject.rows, subject.name):
        memory: Memory = "chance" if name in comparing else "either"
        yield Outcome(name, split, estimate, memory)


def _reason_to_skip(name: str, subject: Subject) -> str:
    """Return why a membership metric cannot be computed, empty if it can."""
    if missing := missing_splits(METRICS[name], subject.rows):
        return f"it needs a split {', '.join(missing)}"
    if name in TEXT_SCORES and subject.score_name != "probability":
        return "it is an attack on texts"
    if name == "membership_auc_zlib" and not hasattr(subject.tools.tokenizer, "batch_decode"):
        return "it needs the model's tokenizer"
    if METRICS[name].against_retrained and subject.retrained is None:
        return "it compares with the retrained model, and none was given"
    return ""


@register_attack("shadow_models")
def shadow_models(subject: Subject) -> Iterator[Outcome]:
    """Infer membership from what the outputs of shadow models show (PGU, WACV 2024, section 4); see `ShadowAttack`."""
    if not subject.shadows:
        raise NotRun("no shadow models were given")
    if subject.score_name != "accuracy":
        raise NotRun("it is an attack on classifiers")
    sets = [("forget", subject.model, subject.rows["forget"])]
    for shadow in subject.shadows:
        sets += [("shadow_member", shadow.model, shadow.members), ("shadow_other", shadow.model, shadow.others)]
    roles: list[str] = []
    outputs, labels = [], []
    for role, model, rows in sets:
        outputs.append(score_classes(model, rows, subject.tools.collator, subject.tools.batch_size)[1])
        labels += [int(row.get("labels", row.get("label"))) for row in (rows[i] for i in range(len(rows)))]
        roles += [role] * len(rows)
    estimate = ShadowAttack.estimate(roles, np.concatenate(outputs), labels, subject.settings.seed)
    yield Outcome("membership_shadow_models", "forget", estimate, "either")
