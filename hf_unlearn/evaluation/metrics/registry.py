"""The metrics that a report can have, each made of measured columns: one entry of `JUDGES` for each name."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_unlearn.data.wrong_answers import ALTERNATIVES
from hf_unlearn.errors import DataError, SettingsError
from hf_unlearn.evaluation.measurements import Columns, wrong_losses
from hf_unlearn.evaluation.metrics.classification import (
    ActivationDistance,
    AverageGap,
    EntropyDistance,
    JSDivergence,
    TugOfWar,
    ZeroRetrainForgetting,
    rates,
)
from hf_unlearn.evaluation.metrics.intervals import Estimate, auc, bootstrap_mean, undefined
from hf_unlearn.evaluation.metrics.language import (
    UTILITY_SPLITS,
    ForgetQuality,
    ModelUtility,
    MultipleChoiceProbability,
    TruthRatio,
    choice_probabilities,
    harmonic,
    log_truth_ratios,
    truth_scores,
)
from hf_unlearn.evaluation.metrics.membership import MembershipAUC, MembershipEfficacy, PrivLeak, never_seen

RETRAINED, TEACHER = "retrained", "teacher"
EACH, TEST = "*", "test|holdout"  # the first of these splits that there is
ALTERNATIVE = "alternatives"  # the measure of wrong answers
UTILITY = tuple(f"{split}_perturbed|{split}" for split in UTILITY_SPLITS)


@dataclass(frozen=True)
class Found:
    """Columns by model and split, and the seed of the bootstrap."""

    columns: Mapping[str, Mapping[str, Columns]]
    seed: int = 0

    def of(self, model: str, split: str) -> Columns:
        """Columns of a split of these alternatives, `a|b`."""
        return self.columns[model][pick(split, self.columns[model])]

    def retrained(self, split: str) -> Columns | None:
        return self.of(RETRAINED, split) if RETRAINED in self.columns else None


Function = Callable[[Found, str, str], Estimate]


@dataclass(frozen=True)
class Judge:
    """How a metric comes about.

    Attributes:
        function: `(found, model, split) -> Estimate`.
        needs: The measures whose columns it reads, by split; the first split's name is recorded. With the one key `*`
            it is judged on each split by itself.
        against_retrained: It compares with the retrained model, and says nothing of that one itself.
        needs_teacher: It compares with a randomly initialised model.
    """

    function: Function
    needs: Mapping[str, tuple[str, ...]]
    against_retrained: bool = False
    needs_teacher: bool = False

    @property
    def by_itself(self) -> bool:
        """Whether it is judged on each split."""
        return EACH in self.needs

    def splits(self, rows: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
        """The measures that it needs of the splits given, by name of the split."""
        if self.by_itself:
            needs = self.needs[EACH]
            return {name: needs for name in rows if ALTERNATIVE not in needs or has_alternatives(rows[name])}
        found = ((pick(split, rows), needs) for split, needs in self.needs.items())
        return {split: needs for split, needs in found if split is not None}

    def check(self, name: str, rows: Mapping[str, Any]) -> None:
        """Raise `DataError` where a split, or its wrong answers, are missing."""
        if missing := self.missing(rows):
            raise DataError(f"metric {name!r} needs a split {', '.join(missing)}; the splits are {', '.join(rows)}")
        splits = self.splits(rows)
        without = [
            split for split, needs in splits.items() if ALTERNATIVE in needs and not has_alternatives(rows[split])
        ]
        if without or not splits:
            raise DataError(
                f"metric {name!r} needs wrong answers, and the split {', '.join(without or rows)} has none; give rows "
                "with a column 'perturbed_answer', as TOFU's *_perturbed splits"
            )

    def missing(self, rows: Mapping[str, Any]) -> list[str]:
        """The splits that it needs and that are not there."""
        wanted = () if self.by_itself else self.needs
        return [" or ".join(split.split("|")) for split in wanted if pick(split, rows) is None]


def pick(split: str, given: Mapping[str, Any]) -> Any:
    """The first of the names `a|b` that is given."""
    return next((name for name in split.split("|") if name in given), None)


def has_alternatives(rows: Any) -> bool:
    return len(rows) > 0 and ALTERNATIVES in rows[0]


def _mean(column: str) -> Function:
    return lambda found, model, split: bootstrap_mean(found.of(model, split)[column], found.seed)


def _unlearning_accuracy(found: Found, model: str, split: str) -> Estimate:
    return bootstrap_mean(1 - found.of(model, split)["accuracy"], found.seed)


def _multiple_choice(found: Found, model: str, split: str) -> Estimate:
    columns = found.of(model, split)
    return MultipleChoiceProbability.estimate(columns["loss"], wrong_losses(columns), found.seed)


def _truth_ratio(arithmetic: bool) -> Function:
    def judge(found: Found, model: str, split: str) -> Estimate:
        columns = found.of(model, split)
        return TruthRatio.estimate(
            columns["paraphrase_loss"], wrong_losses(columns), split.startswith("forget"), arithmetic, found.seed
        )

    return judge


def _forget_quality(found: Found, model: str, split: str) -> Estimate:
    retrained = found.retrained(split)
    other = None if retrained is None else _log_ratios(retrained)
    return ForgetQuality.estimate(_log_ratios(found.of(model, split)), other, found.seed)


def _log_ratios(columns: Columns) -> NDArray:
    return log_truth_ratios(columns["paraphrase_loss"], wrong_losses(columns))


def _model_utility(found: Found, model: str, split: str) -> Estimate:
    groups = {}
    for name, given in zip(UTILITY_SPLITS, UTILITY, strict=True):
        columns = found.of(model, given)
        choices = choice_probabilities(columns["loss"], wrong_losses(columns))
        groups[f"{name}/probability"] = columns["probability"] if name == "retain" else choices
        groups[f"{name}/rouge_l"] = columns["rouge_l_recall_200"]
        groups[f"{name}/truth_ratio"] = truth_scores(_log_ratios(columns), forget=False)
    return ModelUtility.estimate(*rates(groups), found.seed)


def _attack_scores(columns: Columns, attack: str, reference: Columns | None) -> NDArray:
    """Higher for rows that look like members."""
    scores = {
        "loss": lambda: columns["loss"],
        "min_k": lambda: columns["min_k"],
        "min_k_plus_plus": lambda: columns["min_k_plus_plus"],
        "zlib": lambda: columns["loss"] / columns["compressed"],
        "reference": lambda: columns["loss"] - reference["loss"],  # type: ignore[index]
        "gradient_norm": lambda: columns["gradient_norm"],
    }
    return -scores[attack]()


def _attack_columns(found: Found, model: str, attack: str) -> tuple[NDArray, NDArray]:
    """Whether each row is a member, and its score."""
    parts = [_attack_scores(found.of(model, s), attack, found.retrained(s)) for s in ("forget", TEST)]
    return np.repeat([1.0, 0.0], [len(part) for part in parts]), np.concatenate(parts)


def _membership(attack: str) -> Function:
    def judge(found: Found, model: str, split: str) -> Estimate:
        if attack == "reference" and RETRAINED not in found.columns:
            n = sum(len(found.of(model, s)["loss"]) for s in ("forget", TEST))
            return undefined("the reference attack compares with the retrained model, and none was given", n)
        return MembershipAUC.estimate(*_attack_columns(found, model, attack), found.seed)

    return judge


def _priv_leak(found: Found, model: str, split: str) -> Estimate:
    member, score = _attack_columns(found, model, "min_k")
    retrained = _attack_columns(found, RETRAINED, "min_k")[1] if RETRAINED in found.columns else None
    return PrivLeak.estimate(member, score, retrained, found.seed)


def _efficacy(feature: str) -> Function:
    def judge(found: Found, model: str, split: str) -> Estimate:
        parts = {role: found.of(model, s)[feature] for role, s in _ROLES.items()}
        return MembershipEfficacy.estimate(*rates(parts), found.seed)

    return judge


_ROLES = {"retain": "retain", "test": TEST, "forget": "forget"}


def _rates_of(columns: Mapping[str, Columns], names: Sequence[str]) -> dict[str, NDArray]:
    """Each row's part in accuracies and MIA-efficacy, by name; `columns` by role."""
    features = {role: own["probability"] for role, own in columns.items()}
    made = {
        "unlearning": lambda: 1 - columns["forget"]["accuracy"],
        "retain": lambda: columns["retain"]["accuracy"],
        "test": lambda: columns["test"]["accuracy"],
        "membership": lambda: never_seen(features["retain"], features["test"], features["forget"]),
    }
    return {name: made[name]() for name in names}


def _against_retrained(metric: Any, names: Sequence[str]) -> Function:
    def judge(found: Found, model: str, split: str) -> Estimate:
        own = _rates_of({role: found.of(model, s) for role, s in _ROLES.items()}, names)
        if RETRAINED not in found.columns:
            return metric.estimate(*rates(own), None)
        other = _rates_of({role: found.of(RETRAINED, s) for role, s in _ROLES.items()}, names)
        return metric.estimate(*rates(own), rates(other)[1], found.seed)

    return judge


def _pair(metric: Any, column: str, other: str = RETRAINED) -> Function:
    def judge(found: Found, model: str, split: str) -> Estimate:
        against = found.of(other, split)[column] if other in found.columns else None
        return metric.estimate(found.of(model, split)[column], against, found.seed)

    return judge


def _aggregate(found: Found, model: str, split: str) -> Estimate:
    """Harmonic mean of memorisation, privacy and utility (OpenUnlearning, arXiv 2506.12618, section 5).

    Memorisation: harmonic mean of 1 - extraction strength, 1 - exact memorisation, 1 - probability of the paraphrase
    and 1 - p / (p + q), with q the geometric mean over wrong answers. Privacy: harmonic mean over the loss, zlib, min-k
    and min-k++ attacks of `max(0, 1 - |AUC - AUC_retrained| / AUC_retrained)`. Utility: model utility; the paper's
    also counts the fluency of answers, by a classifier of gibberish, which is left out. It has no interval.
    """
    columns = found.of(model, split)
    if RETRAINED not in found.columns:
        return undefined("its privacy part compares with the retrained model, and none was given", len(columns["loss"]))
    known = 1 / (1 + np.exp(_log_ratios(columns)))
    parts = (columns["extraction_strength"], columns["accuracy"], np.exp(-columns["paraphrase_loss"]), known)
    memorisation = harmonic(*(1 - part.mean() for part in parts))
    privacy = harmonic(*(_as_private(found, model, attack) for attack in ("loss", "zlib", "min_k", "min_k_plus_plus")))
    utility = _model_utility(found, model, split).value
    return Estimate(float(harmonic(memorisation, privacy, utility)), None, None, len(columns["loss"]))


def _as_private(found: Found, model: str, attack: str) -> float:
    areas = []
    for kind in (model, RETRAINED):
        member, score = _attack_columns(found, kind, attack)
        areas.append(float(auc(score[member == 1], score[member == 0])))
    if areas[1] == 0:
        return float(areas[0] == 0)
    return max(0.0, 1 - abs(areas[0] - areas[1]) / areas[1])


_ROWS = ("rows",)
_SPLITS = {EACH: _ROWS}
_FORGET = {"forget": _ROWS}
_ATTACKED = {"forget": _ROWS, TEST: _ROWS}
_SETS = {"forget": _ROWS, "retain": _ROWS, TEST: _ROWS}
_OUTPUTS = {"forget": ("classes",)}
_USEFUL = {split: ("rows", "alternatives", "answers") for split in UTILITY}

JUDGES: dict[str, Judge] = {
    "accuracy": Judge(_mean("accuracy"), _SPLITS),
    "answer_probability": Judge(_mean("probability"), _SPLITS),
    "loss": Judge(_mean("loss"), _SPLITS),
    "entropy": Judge(_mean("entropy"), _SPLITS),
    "membership_auc": Judge(_membership("loss"), _ATTACKED),
    "membership_auc_reference": Judge(_membership("reference"), _ATTACKED, against_retrained=True),
    "membership_auc_zlib": Judge(_membership("zlib"), dict.fromkeys(_ATTACKED, ("rows", "texts"))),
    "membership_auc_min_k": Judge(_membership("min_k"), _ATTACKED),
    "membership_auc_min_k_plus_plus": Judge(_membership("min_k_plus_plus"), _ATTACKED),
    "membership_auc_gradient_norm": Judge(_membership("gradient_norm"), dict.fromkeys(_ATTACKED, ("gradients",))),
    "priv_leak": Judge(_priv_leak, _ATTACKED, against_retrained=True),
    "exact_memorisation": Judge(_mean("accuracy"), _SPLITS),
    "extraction_strength": Judge(_mean("extraction_strength"), _SPLITS),
    "multiple_choice_probability": Judge(_multiple_choice, {EACH: ("rows", "alternatives")}),
    "truth_ratio": Judge(_truth_ratio(arithmetic=False), {EACH: ("alternatives",)}),
    "truth_ratio_arithmetic": Judge(_truth_ratio(arithmetic=True), {EACH: ("alternatives",)}),
    "rouge_l": Judge(_mean("rouge_l_recall_200"), {EACH: ("answers",)}),
    "verbatim_memorisation": Judge(_mean("rouge_l_fmeasure_128"), {"forget_verbmem|forget": ("continuations",)}),
    "knowledge_memorisation": Judge(_mean("rouge_l_fmeasure_32"), {"forget_knowmem|forget": ("short_answers",)}),
    "knowledge_utility": Judge(_mean("rouge_l_fmeasure_32"), {"retain_knowmem|retain": ("short_answers",)}),
    "forget_quality": Judge(_forget_quality, {"forget": ("alternatives",)}, against_retrained=True),
    "model_utility": Judge(_model_utility, _USEFUL),
    "aggregate": Judge(
        _aggregate,
        {"forget": ("rows", "alternatives", "texts"), TEST: ("rows", "texts"), **_USEFUL},
        against_retrained=True,
    ),
    "unlearning_accuracy": Judge(_unlearning_accuracy, _FORGET),
    "membership_efficacy": Judge(_efficacy("probability"), _SETS),
    "membership_efficacy_entropy": Judge(_efficacy("entropy"), _SETS),
    "average_gap": Judge(
        _against_retrained(AverageGap, ("unlearning", "retain", "test", "membership")), _SETS, against_retrained=True
    ),
    "tug_of_war": Judge(_against_retrained(TugOfWar, ("unlearning", "retain", "test")), _SETS, against_retrained=True),
    "activation_distance": Judge(_pair(ActivationDistance, "probabilities"), _OUTPUTS, against_retrained=True),
    "js_divergence": Judge(_pair(JSDivergence, "probabilities"), _OUTPUTS, against_retrained=True),
    "entropy_distance": Judge(_pair(EntropyDistance, "entropy"), _FORGET, against_retrained=True),
    "zrf": Judge(_pair(ZeroRetrainForgetting, "probabilities", TEACHER), _OUTPUTS, needs_teacher=True),
}

_DEFAULT = ("accuracy", "answer_probability", "loss", "entropy", "membership_auc")
_ATTACKS = tuple(name for name in JUDGES if name.startswith("membership_auc"))
SUITES: dict[str, tuple[str, ...]] = {
    "default": _DEFAULT,
    "attacks": _ATTACKS,
    "tofu": (
        "answer_probability", "multiple_choice_probability", "truth_ratio", "rouge_l", "exact_memorisation",
        "extraction_strength", "forget_quality", "model_utility", *_ATTACKS, "priv_leak", "aggregate",
    ),
    "muse": ("verbatim_memorisation", "knowledge_memorisation", "knowledge_utility", "priv_leak"),
    "classification": (
        "accuracy", "unlearning_accuracy", "loss", "entropy", "membership_auc", "membership_efficacy",
        "membership_efficacy_entropy", "average_gap", "tug_of_war", "activation_distance", "js_divergence", "zrf",
        "entropy_distance",
    ),
}  # fmt: skip


def choose(names: Sequence[str] | None, rows: Mapping[str, Any]) -> list[str]:
    """Names of metrics, with suites in full; None is the default suite as far as there are splits for it.

    Raises:
        SettingsError: Neither a metric nor a suite.
        DataError: A metric was asked for that lacks a split, or rows with wrong answers.
    """
    if names is None:
        return [name for name in _DEFAULT if not JUDGES[name].missing(rows)]
    chosen: list[str] = []
    for name in [names] if isinstance(names, str) else names:
        if name not in JUDGES and name not in SUITES:
            raise SettingsError(f"unknown metric {name!r}; choose from {', '.join((*JUDGES, *SUITES))}")
        chosen += SUITES.get(name, (name,))
    for name in chosen:
        JUDGES[name].check(name, rows)
    return list(dict.fromkeys(chosen))


def needed(names: Sequence[str], rows: Mapping[str, Any]) -> dict[str, set[str]]:
    """The measures that the metrics need, by split."""
    wanted: dict[str, set[str]] = {split: set() for split in rows}
    for name in names:
        for split, needs in JUDGES[name].splits(rows).items():
            wanted[split].update(needs)
    return wanted


def judge_all(
    names: Sequence[str], found: Found, rows: Mapping[str, Any], model: str
) -> Iterator[tuple[str, str, Estimate]]:
    """(metric, split, estimate) of every metric for one model; `rows` are the splits that were measured."""
    for name in names:
        judge = JUDGES[name]
        if not (judge.against_retrained and model == RETRAINED):
            for split in list(judge.splits(rows))[: None if judge.by_itself else 1]:
                yield name, split, judge.function(found, model, split)
