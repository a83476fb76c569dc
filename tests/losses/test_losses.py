"""Laws of the losses: each equals a dense float64 twin, each lowers the forget probability when followed downhill, and
micro-batches add up to their batch. Each law has a negative control."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import reference_losses as reference
from helpers.loss_batches import (
    NEEDED,
    Batch,
    before,
    dense,
    forget_likelihood,
    gradients,
    made_up,
    memorised,
    moved,
    setup,
    step,
)
from helpers.tiny import (
    CASES,
    collate,
    requires_asset,
    sharpen,
    text_rows,
    tiny_gpt2,
)
from hf_unlearn.errors import SettingsError
from hf_unlearn.losses import LOSSES, build_loss
from hf_unlearn.losses.label_removal import without_label
from hf_unlearn.models.forward import Predictions, output_logits, predict

MODELS = ("gpt2", "llama", "bert", "vit")
NAMES = tuple(reference.TWINS)  # losses of single answers; the others have test files of their own
OTHERS = ("dpo", "altpo", "idk", "rmu", "random_label", "to_reference")
# gamma, alpha and retain term where they are not 1, 0 and nll (open-unlearning's configurations)
WEIGHTS = {
    "grad_diff": (1, 1, "nll"),
    "kl_min": (1, 1, "kl"),
    "npo": (1, 1, "nll"),
    "simnpo": (0.125, 1, "nll"),
    "wga": (1, 1, "nll"),
    "satimp": (0.1, 1, "nll"),
    "pdu": (1, 1, "nll"),
}


def probabilities(predictions: Predictions) -> Tensor:
    return predictions.logits_LV.softmax(-1).gather(1, predictions.labels_L[:, None]).squeeze(1)


def with_probability(p: float) -> Predictions:
    """One label of probability `p` among two classes."""
    logits_LV = torch.tensor([[math.log(p / (1 - p)) if p < 1 else 1e4, 0.0]], requires_grad=True)
    return Predictions(logits_LV, torch.tensor([0]), torch.tensor([0]), 1)


# Values


def test_every_registered_loss_has_a_twin() -> None:
    assert set(LOSSES) == {*NAMES, *OTHERS}
    assert {name for name, kind in LOSSES.items() if kind.skip_first} == reference.SKIPS_FIRST


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("name", NAMES)
def test_forget_term_equals_its_twin(name: str, case: str) -> None:
    model, original, batch = setup(case)
    skip = name in reference.SKIPS_FIRST
    rows, rows_before = (dense(m, batch["forget"], skip) for m in (model, original))
    own = {n: {key: value for key, value in NEEDED.get(n, {}).items() if key != "eps"} for n in NAMES}
    twin = reference.TWINS[name](rows, rows_before, **own[name])
    loss = build_loss(name, NEEDED.get(name, {}) | {"gamma": 1, "alpha": 0})(
        model, batch, before(model, original)
    ).item()
    assert loss == pytest.approx(twin, rel=1e-5, abs=1e-5)
    others = {n: f(rows, rows_before, **own[n]) for n, f in reference.TWINS.items() if f is not reference.TWINS[name]}
    assert all(abs(value - loss) > 1e-3 for value in others.values())  # no other loss is mistaken for it


@pytest.mark.parametrize("settings", [{"offset": 0.2}, {"entropy_weight": 0.0}, {"offset": 0.0, "entropy_weight": 1.5}])
def test_pgu_settings_reach_the_formula(settings: dict[str, float]) -> None:
    model, original, batch = setup("vit")
    batch["forget"]["labels"] = output_logits(model, batch["forget"]).argmax(-1)  # probabilities above the offset
    twin, default = (reference.pgu(dense(model, batch["forget"]), [], **s) for s in (settings, {}))
    assert build_loss("pgu", settings)(model, batch).item() == pytest.approx(twin, rel=1e-5)
    assert abs(twin - default) > 1e-3


@pytest.mark.parametrize("beta", [0.02, 1.0])
def test_npo_beta_reaches_the_formula(beta: float) -> None:
    model, original, batch = setup("llama")
    rows, rows_before = dense(model, batch["forget"]), dense(original, batch["forget"])
    loss = build_loss("npo", {"beta": beta, "alpha": 0})(model, batch, before(model, original)).item()
    assert loss == pytest.approx(reference.npo(rows, rows_before, beta), rel=1e-5)
    assert abs(loss - reference.npo(rows, rows_before, 0.1)) > 1e-3


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("simnpo", {}),
        ("simnpo", {"beta": 0.5, "delta": 0.7}),
        ("undial", {}),
        ("undial", {"beta": 0.5}),
        ("wga", {}),
        ("wga", {"beta": 3.0}),
        ("satimp", {}),
        ("satimp", {"beta1": 0.5, "beta2": 2.0}),
    ],
)
def test_settings_reach_the_formula_and_defaults_are_those_of_the_twin(name: str, settings: dict[str, float]) -> None:
    model, original, batch = setup("llama")
    batch["forget"] = memorised(model, batch["forget"])
    rows, rows_before = dense(model, batch["forget"]), dense(original, batch["forget"])
    loss = build_loss(name, settings | {"gamma": 1, "alpha": 0})(model, batch, before(model, original)).item()
    assert loss == pytest.approx(reference.TWINS[name](rows, rows_before, **settings), rel=2e-5)
    first = next(iter(settings or {"beta1" if name == "satimp" else "beta": 0}))
    assert abs(loss - reference.TWINS[name](rows, rows_before, **settings | {first: 0.9})) > 1e-4


@pytest.mark.parametrize("name", ["wga", "satimp"])
def test_weights_of_labels_carry_no_gradient(name: str) -> None:
    predictions = made_up()
    result = torch.autograd.grad(LOSSES[name].term(predictions, None).sum(), predictions.logits_LV)[0]
    weights_L = (LOSSES[name].term(predictions, None) / predictions.nll_L).detach()
    expected = torch.autograd.grad((weights_L * predictions.nll_L).sum(), predictions.logits_LV)[0]
    torch.testing.assert_close(result, expected)
    p_L = probabilities(predictions)
    free = -p_L if name == "wga" else -(p_L**5) * (1 - p_L)
    through = torch.autograd.grad((free * predictions.nll_L).sum(), predictions.logits_LV)[0]
    assert not torch.allclose(result, through, atol=1e-4)


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("retain", ["nll", "kl"])
@pytest.mark.parametrize("name", ["grad_diff", "ce_u"])
def test_retain_term_equals_its_twin(name: str, retain: str, case: str) -> None:
    model, original, batch = setup(case)
    rows, rows_before = dense(model, batch["retain"]), dense(original, batch["retain"])
    twin = reference.retain_nll(rows) if retain == "nll" else reference.retain_kl(rows, rows_before)
    scope = before(model, original)
    alone = build_loss(name, NEEDED.get(name, {}) | {"gamma": 0, "alpha": 1, "retain": retain})(
        model, batch, scope
    ).item()
    assert alone == pytest.approx(twin, rel=1e-5, abs=1e-5)
    other = reference.retain_kl(rows, rows_before) if retain == "nll" else reference.retain_nll(rows)
    assert abs(alone - other) > 1e-3


def test_retain_nll_is_the_models_own_loss() -> None:
    model, _, batch = setup("gpt2")
    alone = build_loss("grad_diff", {"gamma": 0})(model, batch)
    torch.testing.assert_close(alone, model(**batch["retain"]).loss)


def test_retain_kl_is_zero_and_flat_at_the_original_model_only() -> None:
    model, original, batch = setup("llama")
    loss = build_loss("npo", {"gamma": 0, "retain": "kl"})
    at_start = loss(original, batch, before(original, copy.deepcopy(original)))
    assert abs(at_start.item()) < 1e-6 and gradients(at_start, original).norm() < 1e-3
    later = loss(model, batch, before(model, original))
    assert later.item() > 1e-3 and gradients(later, model).norm() > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_loss_is_gamma_forget_plus_alpha_retain(name: str) -> None:
    model, original, batch = setup("gpt2")
    scope = before(model, original)

    def value(gamma: float, alpha: float) -> float:
        return build_loss(name, NEEDED.get(name, {}) | {"gamma": gamma, "alpha": alpha})(model, batch, scope).item()

    forget, retain = value(1, 0), value(0, 1)
    assert value(0.3, 2.5) == pytest.approx(0.3 * forget + 2.5 * retain, rel=1e-5)
    assert abs(value(0.3, 2.5) - value(2.5, 0.3)) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_default_weights_are_those_of_the_registry(name: str) -> None:
    model, original, batch = setup("gpt2")
    scope, (gamma, alpha, retain) = before(model, original), WEIGHTS.get(name, (1, 0, "nll"))

    def value(**settings: Any) -> float:
        return build_loss(name, NEEDED.get(name, {}) | settings)(model, batch, scope).item()

    default = value()
    assert default == pytest.approx(value(gamma=gamma, alpha=alpha, retain=retain))
    assert abs(default - value(gamma=gamma, alpha=1 - alpha, retain=retain)) > 1e-3
    assert abs(default - value(gamma=2 * gamma)) > 1e-7


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("name", NAMES)
def test_a_small_step_down_lowers_the_forget_probability_and_up_raises_it(name: str, case: str) -> None:
    make, rows = CASES[case]
    original = make()
    batch = {"forget": memorised(original, collate(rows(4, seed=1))), "retain": collate(rows(3, seed=2))}
    loss, changes = build_loss(name, NEEDED.get(name, {}) | {"gamma": 1, "alpha": 0.01}), []
    for size in (2e-3, -2e-3):
        model = copy.deepcopy(original)
        step(model, loss(model, batch, before(model, original)), size)
        changes.append(forget_likelihood(model, batch) - forget_likelihood(original, batch))
    assert changes[0] < -1e-5 and changes[1] > 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_a_small_step_down_lowers_the_probability_of_a_real_story(name: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = requires_asset("stories260K")
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def inputs(text: str) -> Batch:
        tokens = tokenizer.encode(text)
        return collate([{"input_ids": tokens, "labels": tokens}])

    batch = {
        "forget": inputs("Once upon a time, there was a little girl named Lily. She loved to play outside."),
        "retain": inputs("The dog ran to the park and saw a big tree."),
    }
    loss, changes = build_loss(name, NEEDED.get(name, {}) | {"gamma": 1, "alpha": 0.01}), []
    for size in (2e-3, -2e-3):
        model = copy.deepcopy(original)
        step(model, loss(model, batch, before(model, original)), size)
        changes.append(forget_likelihood(model, batch) - forget_likelihood(original, batch))
    assert changes[0] < -1e-5 and changes[1] > 1e-5


# pgu


def test_pgu_has_no_gradient_below_its_offset() -> None:
    pgu = LOSSES["pgu"].term
    for p in (1e-6, 0.01, 0.049):
        predictions = with_probability(p)
        values = pgu(predictions, None, entropy_weight=0.0)
        assert values.item() == 0  # the formula alone would be negative here: 1 - (p - offset) > 1
        assert torch.autograd.grad(values.sum(), predictions.logits_LV)[0].abs().max() == 0
        assert -math.log(1 - (p - 0.05)) < 0
    predictions = with_probability(0.06)
    values = pgu(predictions, None, entropy_weight=0.0)
    assert values.item() == pytest.approx(-math.log(1 - 0.01), rel=1e-4)
    assert torch.autograd.grad(values.sum(), predictions.logits_LV)[0][0, 0] > 0


@pytest.mark.parametrize("p", [0.999999, 1.0])
def test_pgu_stays_finite_as_the_probability_goes_to_one(p: float) -> None:
    pgu = LOSSES["pgu"].term
    predictions = with_probability(p)
    values = pgu(predictions, None)
    assert values.item() == pytest.approx(-math.log(0.05), abs=1e-3)
    assert torch.isfinite(torch.autograd.grad(values.sum(), predictions.logits_LV)[0]).all()
    assert torch.isfinite(pgu(with_probability(p), None, offset=0.0)).all()
    assert torch.isinf(-torch.log(1 - torch.tensor(1.0)))  # what the formula without its clamp would give


# npo


def npo_values(change: Tensor, beta: float) -> Tensor:
    """npo of rows whose negative log-likelihood rose by `change`, through two-class predictions."""
    rows = torch.arange(len(change))
    before_LV = torch.zeros(len(change), 2)
    # nll of class 0 under logits (z, 0) is log(1 + exp(-z)); solve for the wanted one
    z = -torch.log(torch.expm1(math.log(2) + change))
    now = Predictions(torch.stack([z, torch.zeros_like(z)], 1), torch.zeros_like(rows), rows, len(rows))
    return LOSSES["npo"].term(now, Predictions(before_LV, torch.zeros_like(rows), rows, len(rows)), beta=beta)


def test_npo_falls_as_the_answer_is_forgotten() -> None:
    values = npo_values(torch.tensor([-0.5, 0.0, 1.0, 5.0, 20.0]), beta=0.5)
    assert (values.diff() < 0).all()  # the sign trap: the loss of the swapped difference rises instead
    assert values[1].item() == pytest.approx(2 / 0.5 * math.log(2), rel=1e-5)
    expected = [2 / 0.5 * math.log1p(math.exp(-0.5 * s)) for s in (-0.5, 0.0, 1.0, 5.0, 20.0)]
    np.testing.assert_allclose(values, expected, rtol=1e-4)


def test_npo_tends_to_gradient_ascent_as_beta_vanishes() -> None:
    def npo_gradient(beta: float) -> Tensor:
        now = made_up(seed=1)
        old = Predictions(made_up(seed=2).logits_LV.detach(), now.labels_L, now.rows_L, now.n_rows)
        return torch.autograd.grad(LOSSES["npo"].term(now, old, beta=beta).sum(), now.logits_LV)[0]

    now = made_up(seed=1)
    ascent = torch.autograd.grad(LOSSES["grad_ascent"].term(now, None).sum(), now.logits_LV)[0]
    torch.testing.assert_close(npo_gradient(1e-5), ascent, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(npo_gradient(1.0), ascent, rtol=1e-2, atol=1e-2)
    change = torch.tensor([-0.3, 0.1, 2.0])
    difference = npo_values(change, 1e-2) + change  # minus gradient ascent: the same constant for all rows
    np.testing.assert_allclose(difference, 2 / 1e-2 * math.log(2), atol=2e-2)


def test_npo_gradient_vanishes_once_forgotten_and_that_of_gradient_ascent_does_not() -> None:
    change = torch.tensor([0.0, 10.0, 40.0], requires_grad=True)
    slope = torch.autograd.grad(npo_values(change, beta=1.0).sum(), change)[0]
    assert slope[0].item() == pytest.approx(-1, abs=1e-4)  # -2 sigmoid(-beta change)
    assert abs(slope[1]) < 1e-3 and abs(slope[2]) < 1e-12
    hardly = torch.autograd.grad(npo_values(change, beta=1e-3).sum(), change)[0]
    assert hardly[2] < -0.9


# Targets


def test_target_without_the_label_is_the_rest_renormalised() -> None:
    predictions = made_up()
    target_LV = without_label(predictions.logits_LV, predictions.labels_L)
    logits = predictions.logits_LV.detach().double().numpy()
    twin = [reference.without(z, y) for z, y in zip(logits, predictions.labels_L.tolist(), strict=True)]
    np.testing.assert_allclose(target_LV, twin, atol=1e-6)
    assert (target_LV.gather(1, predictions.labels_L[:, None]) == 0).all()
    assert (probabilities(predictions) > 0).all()  # which the prediction itself gives it


def test_ce_u_target_is_held_fixed() -> None:
    predictions = made_up()
    result = torch.autograd.grad(LOSSES["ce_u"].term(predictions, None).sum(), predictions.logits_LV)[0]
    z = predictions.logits_LV
    target_LV = without_label(z, predictions.labels_L)
    torch.testing.assert_close(result, (z.softmax(-1) - target_LV).detach())  # softmax minus target: no path through it
    free_LV = z.scatter(1, predictions.labels_L[:, None], -torch.inf).softmax(-1)
    through = torch.autograd.grad(-(free_LV * z.log_softmax(-1)).sum(), z)[0]
    assert not torch.allclose(result, through, atol=1e-3)


def test_ce_u_skips_the_first_label_of_a_sequence_only() -> None:
    model, _, batch = setup("gpt2")
    result = build_loss("ce_u")(model, batch).item()
    assert result == pytest.approx(reference.ce_u(dense(model, batch["forget"], True), []), rel=1e-5)
    assert abs(result - reference.ce_u(dense(model, batch["forget"], False), [])) > 1e-3
    model, _, batch = setup("vit")
    assert build_loss("ce_u")(model, batch).item() == pytest.approx(
        reference.ce_u(dense(model, batch["forget"]), []), rel=1e-5
    )


@pytest.mark.parametrize("case", ["gpt2", "vit"])
def test_next_best_reads_the_original_model_and_not_the_current_one(case: str) -> None:
    make, rows = CASES[case]
    original, batch = sharpen(make(), 1.5), {"forget": collate(rows(4))}
    model = moved(original)
    now, then = dense(model, batch["forget"]), dense(original, batch["forget"])
    result = build_loss("next_best")(model, batch, before(model, original)).item()
    assert result == pytest.approx(reference.next_best(now, then), rel=1e-5)
    assert abs(result - reference.next_best(now, now)) > 1e-3


# The original model


@pytest.mark.parametrize(("name", "settings"), [("npo", {}), ("next_best", {}), ("grad_diff", {"retain": "kl"})])
def test_losses_that_read_the_original_model_declare_it(name: str, settings: dict[str, Any]) -> None:
    model, original, batch = setup("vit")
    loss = build_loss(name, settings)
    assert loss.needs_original
    with pytest.raises(SettingsError, match=f"{name!r} reads the original model"):
        loss(model, batch)
    assert torch.isfinite(loss(model, batch, before(model, original)))
    assert not build_loss("grad_diff").needs_original and not build_loss("pgu", {"retain": "kl"}).needs_original


@pytest.mark.parametrize("training", [True, False])
def test_the_original_model_predicts_without_dropout_and_the_training_mode_is_restored(training: bool) -> None:
    model = tiny_gpt2(dropout=0.5).train(training)
    batch, seen = {"forget": collate(text_rows(4))}, []

    @contextmanager
    def original() -> Iterator[None]:
        seen.append(model.training)
        yield

    build_loss("next_best")(model, batch, original)
    assert seen == [False] and model.training is training
    modes = [m.training for m in model.modules()]
    assert modes == [training] * len(modes)
    with torch.no_grad():
        logits = [predict(model.train(), batch["forget"]).logits_LV for _ in range(2)]
    assert not torch.equal(*logits)  # dropout would show


def test_the_training_mode_is_restored_when_the_original_model_fails() -> None:
    model = tiny_gpt2().train()

    @contextmanager
    def broken() -> Iterator[None]:
        raise RuntimeError("no weights")
        yield

    with pytest.raises(RuntimeError, match="no weights"):
        build_loss("npo")(model, {"forget": collate(text_rows(2))}, broken)
    assert model.training


@pytest.mark.parametrize("name", ["npo", "next_best"])
def test_no_gradient_flows_through_the_original_model(name: str) -> None:
    model, original, batch = setup("vit", retain=False)
    build_loss(name, NEEDED.get(name))(model, batch, before(model, original)).backward()
    assert all(p.grad is None for p in original.parameters())
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
