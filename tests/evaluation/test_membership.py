"""Laws of the membership attacks: by hand, against twins, and that they find members where there are any."""

from __future__ import annotations

import math
import zlib
from typing import Any

import numpy as np
import pytest
import torch

from helpers import reference_metrics as reference
from helpers.tiny import CASES, collate, text_rows, tiny_gpt2, tiny_llama
from hf_unlearn.data.batches import PaddingCollator
from hf_unlearn.evaluation.gradient_norms import gradient_norms
from hf_unlearn.evaluation.measurements import compressed_lengths
from hf_unlearn.evaluation.metrics.intervals import Undefined
from hf_unlearn.evaluation.metrics.membership import (
    MembershipAUC,
    MembershipEfficacy,
    PrivLeak,
    ShadowAttack,
)


def test_membership_auc_by_hand() -> None:
    """Members 3 and 1, others 2 and 0: three of four pairs are in order."""
    assert MembershipAUC.estimate([1, 1, 0, 0], [3, 1, 2, 0]).value == 0.75
    assert MembershipAUC.estimate([0, 0, 1, 1], [3, 1, 2, 0]).value == 0.25


def test_priv_leak_by_hand_and_by_twin() -> None:
    """AUC 3/4, the retrained model's 1/2: 100 (1/4 - 1/2) / (1/2) is -50, under-unlearned; swapped it is 100."""
    member, score, retrained = [1, 1, 0, 0], [3, 1, 2, 0], [3, 0, 2, 1]
    assert PrivLeak.estimate(member, score, retrained).value == pytest.approx(-50)
    assert PrivLeak.estimate(member, retrained, score).value == pytest.approx(100)
    rng = np.random.default_rng(0)
    a, b, c, d = (rng.normal(shift, 1, n) for shift, n in ((0.5, 20), (0, 25), (0.1, 20), (0, 25)))
    result = PrivLeak.estimate(np.repeat([1, 0], [20, 25]), np.r_[a, b], np.r_[c, d])
    assert result.value == pytest.approx(reference.priv_leak(a, b, c, d)) and result.n == 45
    assert result.low is not None and result.high is not None and result.low < result.value < result.high


def test_priv_leak_is_undefined_without_a_retrained_model_or_where_that_one_is_perfect() -> None:
    for retrained, reason in ((None, "no retrained model"), ([3, 2, 1, 0], "perfectly")):
        result = PrivLeak.estimate([1, 1, 0, 0], [3, 1, 2, 0], retrained)
        assert isinstance(result, Undefined) and reason in result.reason and math.isnan(result.value)


def efficacy(retain: Any, test: Any, forget: Any) -> Any:
    parts = {"retain": retain, "test": test, "forget": forget}
    return MembershipEfficacy.estimate([r for r, v in parts.items() for _ in v], np.concatenate(list(parts.values())))


def test_efficacy_is_the_share_of_forget_rows_on_the_side_of_the_test_rows() -> None:
    """Retain rows have confidence 0.9, test rows 0.1: the border is half way, three of four forget rows are below."""
    result = efficacy([0.9] * 20, [0.1] * 20, [0.2, 0.3, 0.4, 0.8])
    assert result.value == 0.75 and result.n == 4
    assert efficacy([0.1] * 20, [0.9] * 20, [0.2, 0.3, 0.4, 0.8]).value == 0.25
    assert efficacy([0.9] * 2000, [0.1] * 20, [0.4]).value == 1  # classes are balanced


def test_efficacy_needs_all_three_and_finite_features() -> None:
    assert isinstance(efficacy([0.9], [], [0.5]), Undefined)
    assert isinstance(efficacy([0.9], [0.1], [math.nan]), Undefined)
    assert efficacy([0.9], [0.1], [0.2]).value == 1


def shadow_rows(n: int, seed: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Members have a confident softmax output, others a flat one."""
    rng = np.random.default_rng(seed)
    role = np.repeat(["shadow_member", "shadow_other"], n)
    top = np.where(role == "shadow_member", rng.uniform(0.8, 1, 2 * n), rng.uniform(0.4, 0.7, 2 * n))
    return list(role), np.stack([top, 1 - top], axis=1), np.zeros(2 * n)


def test_the_shadow_attack_finds_what_the_shadows_show() -> None:
    role, probabilities, label = shadow_rows(100, 0)
    forget = [[0.95, 0.05], [0.9, 0.1], [0.55, 0.45], [0.85, 0.15]]
    whole = [*role, *["forget"] * 4], [*probabilities, *forget], [*label, *[0] * 4]
    result = ShadowAttack.estimate(*whole)
    assert result.value == 0.25 and result.n == 4
    swapped = [{"shadow_member": "shadow_other", "shadow_other": "shadow_member"}.get(r, r) for r in whole[0]]
    assert ShadowAttack.estimate(swapped, *whole[1:]).value == 0.75
    assert isinstance(ShadowAttack.estimate(["forget"], [[0.5, 0.5]], [0]), Undefined)


def test_a_repetitive_text_compresses() -> None:
    assert compressed_lengths(["ab" * 50, ""]).tolist() == [len(zlib.compress(b"ab" * 50)), len(zlib.compress(b""))]
    assert compressed_lengths(["ab" * 50])[0] < 50 < compressed_lengths(["".join(map(chr, range(32, 132)))])[0]


@pytest.mark.parametrize("case", ["gpt2", "llama", "vit", "mlp"])
def test_gradient_norms_equal_those_of_each_row_alone(case: str) -> None:
    make, rows = CASES[case]
    model, data = make().double(), rows(4)
    data = [{k: v.double() if getattr(v, "is_floating_point", bool)() else v for k, v in r.items()} for r in data]
    result = gradient_norms(model, data, PaddingCollator())
    for row, norm in zip(data, result, strict=True):
        twin = make().double()
        inputs = collate([row])
        labels = inputs.pop("labels")
        output = twin(**inputs)
        logits = getattr(output, "logits", output)
        if labels.ndim == 2:
            kept = labels[0, 1:] != -100
            logits, labels = logits[0, :-1][kept], labels[0, 1:][kept]
        (-logits.log_softmax(-1)[range(len(labels)), labels]).mean().backward()
        squares = sum(float((p.grad**2).sum()) for p in twin.parameters() if p.grad is not None)
        assert norm == pytest.approx(math.sqrt(squares), rel=1e-5)
    assert np.ptp(result) > 1e-3


def test_gradient_norms_leave_gradients_mode_and_frozen_weights_as_they_were() -> None:
    model = tiny_llama().train()
    first, *rest = model.parameters()
    for weight in rest:
        weight.requires_grad_(False)
    first.grad = torch.ones_like(first)
    gradient_norms(model, text_rows(2), PaddingCollator())
    assert model.training and torch.equal(first.grad, torch.ones_like(first))
    assert first.requires_grad and not any(w.requires_grad or w.grad is not None for w in rest)


def test_dropout_does_not_reach_gradient_norms() -> None:
    result = [gradient_norms(tiny_gpt2(dropout=0.5).train(), text_rows(3), PaddingCollator()) for _ in range(2)]
    assert np.array_equal(*result)
