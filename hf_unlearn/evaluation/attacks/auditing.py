"""`audit`: attack the unlearned and the retrained model, and compare.

Each attack runs on both models and restores their weights.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn

from hf_unlearn.core.provenance import hardware, package_versions
from hf_unlearn.core.sharding import require_whole
from hf_unlearn.data.formats import Rows
from hf_unlearn.data.left_out import cut_records
from hf_unlearn.evaluation.attacks.registry import ATTACKS
from hf_unlearn.evaluation.attacks.subject import (
    AuditSettings,
    Memory,
    NotRun,
    Outcome,
    Shadow,
    Skipped,
    Subject,
)
from hf_unlearn.evaluation.evaluate import ModelOrScope, encode_splits, metric_value, model_scope
from hf_unlearn.evaluation.measurements import MeasurementTools
from hf_unlearn.evaluation.metrics.classification import AnamnesisIndex
from hf_unlearn.evaluation.report import MetricValue, UnlearningReport
from hf_unlearn.models.tasks import Collator, ProcessingClass

__all__ = ["ATTACKS", "AuditSettings", "Shadow", "audit", "verdict"]

ALIKE = "no difference from the retrained model shown"


def audit(
    model: nn.Module,
    splits: Mapping[str, Rows],
    *,
    original: ModelOrScope | None = None,
    retrained: nn.Module | None = None,
    attacks: Sequence[str] | None = None,
    settings: AuditSettings | None = None,
    shadows: Sequence[Shadow] = (),
    processing_class: "ProcessingClass | None" = None,
    collator: Collator | None = None,
    batch_size: int = 16,
) -> UnlearningReport:
    """Attack `model`, and compare with the retrained model.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_unlearn import audit
    >>> config = LlamaConfig(
    ...     vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    >>> model, retrained = LlamaForCausalLM(config), LlamaForCausalLM(config)
    >>> rows = [{"input_ids": [1, token, token + 1], "labels": [-100, token, token + 1]} for token in range(2, 8)]
    >>> report = audit(model, {"forget": rows}, retrained=retrained, attacks=["quantisation"])
    >>> sorted(report.audit["verdicts"])
    ['quantised_4_bit_probability', 'quantised_8_bit_probability']

    Args:
        model: The unlearned model; it is restored after each attack.
        splits: Rows by name of the split: `forget`, and for most attacks `retain` and `holdout` (or `test`).
        original: The model before unlearning, whose score relearning has to reach, or a callable that returns a
            context manager around it, as in `evaluate_unlearning`.
        retrained: The model trained without the forget rows; without it there are numbers but no verdicts.
        attacks: Names of `ATTACKS`; default: all. One that the model or the rows do not allow is reported as not run.
        settings: Strength of the attacks.
        shadows: Models that the attacker trained, for the attack `shadow_models` on classifiers.
        processing_class: As in `evaluate_unlearning`.
        collator: As in `evaluate_unlearning`.
        batch_size: Rows per forward pass.

    Returns:
        A report with the numbers of the unlearned and the retrained model as `metrics`; its `audit` holds a verdict for
        each number (`verdicts`), and what was `not_run` with the reason.

    Raises:
        SettingsError: An attack is unknown.
        ModelError: A model's weights are sharded over processes.
        DataError: There is no split `forget`, or a split is empty.
    """
    names, settings = list(attacks or ATTACKS), settings or AuditSettings()
    for name in names:
        ATTACKS.find(name)
    rows = encode_splits(splits, processing_class, model)
    tools = MeasurementTools.build(processing_class, collator, batch_size)
    original_score_N = None
    if original is not None:
        with model_scope(original) as candidate:
            original_score_N = Subject(candidate, rows, tools, settings).score(rows["forget"])
    for attacked in (model, retrained):
        if attacked is not None:
            require_whole(attacked, "an audit")
    other = None
    if retrained is not None:
        other = Subject(retrained, rows, tools, settings, original_score_N, shadows, name="retrained")
    subjects = [Subject(model, rows, tools, settings, original_score_N, shadows, retrained=other)]
    subjects += [other] if other is not None else []
    report = UnlearningReport(data=cut_records(rows), versions=package_versions(), hardware=hardware())
    report.audit = {"verdicts": {}, "not_run": {}}
    for name in names:
        outcomes = _run(name, subjects, report.audit["not_run"])
        numbers = _numbers(outcomes, settings.seed)
        report.metrics += numbers
        report.audit["verdicts"] |= _verdicts(numbers, outcomes)
    return report


def _run(name: str, subjects: Sequence[Subject], not_run: dict[str, str]) -> dict[str, list[Outcome]]:
    """Run one attack on each model; return the outcomes by model, and add what could not be run to `not_run`."""
    outcomes: dict[str, list[Outcome]] = {}
    for subject in subjects:
        on_model = "" if subject.name == "unlearned" else f"on the {subject.name} model: "
        try:
            results = list(ATTACKS[name](subject))
        except NotRun as reason:
            not_run.setdefault(name, f"{on_model}{reason}")
            continue
        for result in results:
            if isinstance(result, Skipped):
                not_run.setdefault(result.name, f"{on_model}{result.reason}")
        outcomes[subject.name] = [result for result in results if isinstance(result, Outcome)]
    return outcomes


def _numbers(outcomes: Mapping[str, Sequence[Outcome]], seed: int) -> list[MetricValue]:
    """Return the numbers of an attack as the report stores them, with the anamnesis index of steps of relearning."""
    numbers = [
        metric_value(outcome.name, outcome.split, model, outcome.estimate, seed)
        for model, of_model in outcomes.items()
        for outcome in of_model
    ]
    retrained = {outcome.name: outcome for outcome in outcomes.get("retrained", ())}
    for outcome in outcomes.get("unlearned", ()):
        if outcome.anamnesis_index and outcome.name in retrained:
            index = AnamnesisIndex.estimate([_steps(outcome)], [_steps(retrained[outcome.name])])
            numbers.append(metric_value(outcome.anamnesis_index, outcome.split, "unlearned", index, 0))
    return numbers


def _steps(outcome: Outcome) -> float:
    """Return the steps to relearn, infinite if the allowed steps were not enough."""
    value = outcome.estimate.value
    return np.inf if np.isnan(value) else value


def _verdicts(numbers: Sequence[MetricValue], outcomes: Mapping[str, Sequence[Outcome]]) -> dict[str, str]:
    """Return the verdict of each number of the unlearned model on the forget rows."""
    retrained = {(number.name, number.split): number for number in numbers if number.model == "retrained"}
    verdicts = {}
    for outcome in outcomes.get("unlearned", ()):
        if outcome.split == "forget" and outcome.memory != "none":
            number, key = (
                metric_value(outcome.name, "forget", "unlearned", outcome.estimate, 0),
                (outcome.name, "forget"),
            )
            verdicts[outcome.name] = verdict(number, retrained.get(key), outcome.memory)
    return verdicts


def verdict(number: MetricValue, retrained: MetricValue | None, memory: Memory) -> str:
    """Compare the unlearned model's number with the retrained model's, in words.

    The numbers differ if their 95% intervals do not overlap. That no difference was shown does not prove that there is
    none: with few rows the intervals are wide. A number without an interval is compared as it is.
    """
    if memory == "chance" and not np.isnan(number.value):
        low, high = _bounds(number)
        return "cannot be told from held-out rows" if low <= 0.5 <= high else "can be told from held-out rows"
    if retrained is None:
        return "unknown: no retrained model to compare with"
    if np.isnan(number.value) or np.isnan(retrained.value):
        return f"unknown: {number.reason or retrained.reason or 'a number is undefined'}"
    (low, high), (other_low, other_high) = _bounds(number), _bounds(retrained)
    if low <= other_high and other_low <= high:
        return ALIKE
    above = low > other_high
    if memory == "either":
        return f"stands out from the retrained model, {'above' if above else 'below'} it"
    return "remembers more than the retrained model" if above == (memory == "more") else "remembers less than it"


def _bounds(number: MetricValue) -> tuple[float, float]:
    low, high = number.low, number.high
    return (number.value if low is None else low), (number.value if high is None else high)
