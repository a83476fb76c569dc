"""`audit`: can what was forgotten be brought back, or told from what was never seen?

Every attack is made on the unlearned and, for comparison, on the retrained model; weights are put back after each.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from hf_unlearn.core.provenance import hardware, package_versions
from hf_unlearn.core.sharding import require_whole
from hf_unlearn.data.batches import default_collator
from hf_unlearn.data.encoding import encode_dataset
from hf_unlearn.errors import DataError, SettingsError
from hf_unlearn.evaluation.attacks.inputs import few_shot_prompts, linear_probe, paraphrased_prompts, shadow_models
from hf_unlearn.evaluation.attacks.subject import Attack, AuditSettings, NotRun, Outcome, Shadow, Subject
from hf_unlearn.evaluation.attacks.weights import quantisation, recalibration, relearning, relearning_on_other_data
from hf_unlearn.evaluation.evaluate import ModelOrScope, evaluate_unlearning, opened, record
from hf_unlearn.evaluation.measurements import MeasurementTools
from hf_unlearn.evaluation.metrics.classification import AnamnesisIndex
from hf_unlearn.evaluation.metrics.registry import JUDGES, SUITES
from hf_unlearn.evaluation.report import MetricValue, UnlearningReport

__all__ = ["ATTACKS", "AuditSettings", "Shadow", "audit"]

ATTACKS: dict[str, Attack] = {
    "relearning": relearning,
    "relearning_on_other_data": relearning_on_other_data,
    "quantisation": quantisation,
    "recalibration": recalibration,
    "paraphrased_prompts": paraphrased_prompts,
    "few_shot_prompts": few_shot_prompts,
    "linear_probe": linear_probe,
    "shadow_models": shadow_models,
}
MEMBERSHIP = (*SUITES["attacks"], "membership_efficacy")
ALL = ("membership", *ATTACKS)
ALIKE = "no difference from the retrained model shown"


def audit(
    model: nn.Module,
    splits: Mapping[str, Any],
    *,
    original: ModelOrScope | None = None,
    retrained: nn.Module | None = None,
    attacks: Sequence[str] | None = None,
    settings: AuditSettings | None = None,
    shadows: Sequence[Shadow] = (),
    processing_class: Any = None,
    collator: Callable | None = None,
    batch_size: int = 16,
) -> UnlearningReport:
    """Attack `model` and compare with the retrained one.

    Args:
        model: The unlearned model; it comes back as it was.
        splits: Rows by name: `forget`, and for most attacks `retain` and `holdout` (or `test`).
        original: The model before unlearning, whose scores relearning has to come back to; or a context manager's
            callable, as in `evaluate_unlearning`.
        retrained: The model trained without the forget rows; without it there are numbers and no verdicts.
        attacks: Which of `ALL`; default all that the model and the rows allow.
        settings: How hard to attack.
        shadows: Models that the attacker trained, for the seed's membership attack on classifiers.
        processing_class, collator, batch_size: As in `evaluate_unlearning`.

    Returns:
        The numbers as `metrics`, for `unlearned` and `retrained`; in `audit` a verdict for each number and what could
        not be run, with the reason.

    Raises:
        SettingsError: An unknown attack.
        ModelError: A model's weights are sharded over processes.
        DataError: No split named `forget`, or an empty one.
    """
    chosen, settings = list(attacks or ALL), settings or AuditSettings()
    for name in chosen:
        if name not in ALL:
            raise SettingsError(f"unknown attack {name!r}; choose from {', '.join(ALL)}")
    if "forget" not in splits:
        raise DataError(f"the splits are {sorted(splits)}; one must be named 'forget'")
    rows = {name: encode_dataset(data, processing_class, what=name, model=model) for name, data in splits.items()}
    tools = MeasurementTools(collator or default_collator(processing_class), processing_class, batch_size)
    report = UnlearningReport(versions=package_versions(), hardware=hardware())
    before = None
    if original is not None:
        with opened(original) as other:
            before = Subject(other, rows, tools, settings).score(rows["forget"])
    kinds = {"unlearned": model} | ({"retrained": retrained} if retrained is not None else {})
    for each in kinds.values():
        require_whole(each, "an audit")
    subjects = {kind: Subject(m, rows, tools, settings, before, shadows) for kind, m in kinds.items()}
    verdicts: dict[str, str] = {}
    not_run: dict[str, str] = {}
    for name in chosen:
        if name == "membership":
            found = _membership(subjects, not_run)
            memory: Mapping[str, str] = dict.fromkeys(MEMBERSHIP, "either")
        else:
            found, memory = _attack(name, subjects, not_run)
        report.metrics += found
        verdicts |= _verdicts(found, memory)
    report.audit = {"verdicts": verdicts, "not_run": not_run}
    return report


def _membership(subjects: Mapping[str, Subject], not_run: dict[str, str]) -> list[MetricValue]:
    """The six attacks, and the classifier of retain against held-out rows."""
    subject, retrained = subjects["unlearned"], subjects.get("retrained")
    names = []
    for name in MEMBERSHIP:
        missing = JUDGES[name].missing(subject.rows)
        if missing:
            not_run[name] = f"it needs a split {', '.join(missing)}"
        elif name.endswith(("zlib", "min_k", "min_k_plus_plus")) and subject.measure != "probability":
            not_run[name] = "it is an attack on texts"
        elif name.endswith("zlib") and not hasattr(subject.tools.tokenizer, "batch_decode"):
            not_run[name] = "it needs the model's tokenizer"
        elif name.endswith("reference") and retrained is None:
            not_run[name] = "it compares with the retrained model, and none was given"
        else:
            names.append(name)
    if not names:
        return []
    return evaluate_unlearning(
        subject.model, subject.rows, retrained=None if retrained is None else retrained.model, metrics=names,
        processing_class=subject.tools.tokenizer, collator=subject.tools.collator,
        batch_size=subject.tools.batch_size, seed=subject.settings.seed,
    ).metrics  # fmt: skip


def _attack(
    name: str, subjects: Mapping[str, Subject], not_run: dict[str, str]
) -> tuple[list[MetricValue], Mapping[str, str]]:
    """One attack on each model; a metric for each number, and what it tells of memory."""
    found: list[MetricValue] = []
    outcomes: dict[str, list[Outcome]] = {}
    for kind, subject in subjects.items():
        try:
            outcomes[kind] = list(ATTACKS[name](subject))
        except NotRun as reason:
            not_run.setdefault(name, str(reason) if kind == "unlearned" else f"on the {kind} model: {reason}")
            continue
        seed = subject.settings.seed
        found += [record(one.name, one.split, kind, one.estimate, seed) for one in outcomes[kind]]
    memory = {one.name: one.memory for each in outcomes.values() for one in each if one.memory != "none"}
    if name == "relearning" and len(outcomes) == 2:
        mine, others = ([_steps(outcomes[kind])] for kind in ("unlearned", "retrained"))
        found.append(
            record("relearned_anamnesis_index", "forget", "unlearned", AnamnesisIndex.estimate(mine, others), 0)
        )
    return found, memory


def _steps(outcomes: Sequence[Outcome]) -> float:
    """Steps to relearn, infinite where they were not enough."""
    value = next(one.estimate.value for one in outcomes if one.memory == "less")
    return np.inf if np.isnan(value) else value


def _verdicts(metrics: Sequence[MetricValue], memory: Mapping[str, str]) -> dict[str, str]:
    """What each number of the unlearned model says next to the retrained model's."""
    by_model = {(m.name, m.split, m.model): m for m in metrics}
    found = {}
    for metric in metrics:
        if metric.model == "unlearned" and memory.get(metric.name, "none") != "none":
            other = by_model.get((metric.name, metric.split, "retrained"))
            if metric.split == "forget":
                found[metric.name] = verdict(metric, other, memory[metric.name])
    return found


def verdict(metric: MetricValue, retrained: MetricValue | None, memory: str) -> str:
    """The unlearned model's number against the retrained one's, in words.

    They are taken to differ where their 95% intervals do not overlap. That no difference was shown is no proof of none:
    with few rows the intervals are wide. A number without an interval is compared as it is.
    """
    if metric.name.startswith("membership_auc_reference") and not np.isnan(metric.value):
        low, high = _bounds(metric)
        return "cannot be told from held-out rows" if low <= 0.5 <= high else "can be told from held-out rows"
    if retrained is None:
        return "unknown: no retrained model to compare with"
    if np.isnan(metric.value) or np.isnan(retrained.value):
        return f"unknown: {metric.reason or retrained.reason or 'a number is undefined'}"
    (low, high), (other_low, other_high) = _bounds(metric), _bounds(retrained)
    if low <= other_high and other_low <= high:
        return ALIKE
    above = low > other_high
    if memory == "either":
        return f"stands out from the retrained model, {'above' if above else 'below'} it"
    return "remembers more than the retrained model" if above == (memory == "more") else "remembers less than it"


def _bounds(metric: MetricValue) -> tuple[float, float]:
    low, high = metric.low, metric.high
    return (metric.value if low is None else low), (metric.value if high is None else high)
