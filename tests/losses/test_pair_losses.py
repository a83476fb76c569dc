"""Laws of the losses that read more than one answer's predictions: alternate answers (dpo, altpo, idk), a layer's
outputs (rmu), the row itself (random_label), a dual weight (pdu); and of losses that users bring. Each has a twin or
an identity, and a negative control."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import reference_losses as reference
from helpers.loss_batches import Batch, before, dense, forget_likelihood, gradients, made_up, memorised, moved, step
from helpers.tiny import (
    CASES,
    CLASSES,
    collate,
    image_rows,
    requires_asset,
    sharpen,
    text_class_rows,
    text_rows,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_mlp,
    tiny_vit,
    vector_rows,
)  # fmt: skip
from torch import Tensor, nn

from hf_unlearn.errors import DataError, ModelError, SettingsError
from hf_unlearn.losses import LOSSES, build_loss, register_loss
from hf_unlearn.losses.dual_weight import DualWeight
from hf_unlearn.models.forward import Predictions, find_module, predict

PREFERENCES = ("dpo", "altpo", "idk")
TEXT = ("gpt2", "llama")
HIDDEN = ("gpt2", "llama", "bert", "vit")


def with_alternates(case: str) -> tuple[nn.Module, nn.Module, Batch]:
    """(model, original, batch) with alternate answers of other lengths than the forget answers."""
    make, rows = CASES[case]
    original = sharpen(make(), 1.5)
    alternate = text_rows(4, seed=9, lengths=(5, 8, 4, 6))
    batch = {"forget": collate(rows(4, seed=1)), "retain": collate(rows(3, seed=2)), "alternate": collate(alternate)}
    return moved(original), original, batch


# Alternate answers


@pytest.mark.parametrize("beta", [0.1, 1.0])
@pytest.mark.parametrize("case", TEXT)
@pytest.mark.parametrize("name", PREFERENCES)
def test_preference_equals_its_twin(name: str, case: str, beta: float) -> None:
    model, original, batch = with_alternates(case)
    dense_ = [dense(m, batch[part]) for part in ("forget", "alternate") for m in (model, original)]
    twin = reference.dpo(*dense_, beta=beta)
    settings = {"alpha": 0} | ({} if beta == 0.1 else {"beta": beta})  # 0.1 is the default
    loss = build_loss(name, settings)(model, batch, before(model, original)).item()
    assert loss == pytest.approx(twin, rel=1e-5)
    swapped = reference.dpo(*dense_[2:], *dense_[:2], beta=beta)
    assert abs(loss - swapped) > 1e-3  # the sign trap
    assert abs(loss - reference.npo(*dense_[:2], beta=beta)) > 1e-3


def test_preference_with_an_unchanged_alternate_is_npo() -> None:
    model, original, batch = with_alternates("llama")

    def values(alternate: Predictions, name: str) -> Tensor:
        with torch.no_grad():
            now, old = predict(model, batch["forget"]), predict(original, batch["forget"])
            both = [Predictions(**{**vars(p), "alternate": alternate}) for p in (now, old)]
            return LOSSES[name].term(*both)

    torch.testing.assert_close(*(values(predict(original, batch["alternate"]), name) for name in ("dpo", "npo")))


@pytest.mark.parametrize("case", TEXT)
@pytest.mark.parametrize("name", PREFERENCES)
def test_a_small_step_down_prefers_the_alternate_answer(name: str, case: str) -> None:
    _, original, batch = with_alternates(case)
    batch["forget"] = memorised(original, batch["forget"])
    loss, changes = build_loss(name, {"alpha": 0.01}), []
    for size in (2e-3, -2e-3):
        model = copy.deepcopy(original)
        step(model, loss(model, batch, before(model, original)), size)
        parts = ({"forget": batch["forget"]}, {"forget": batch["alternate"]})
        changes.append([forget_likelihood(model, part) - forget_likelihood(original, part) for part in parts])
    (forget, alternate), (forget_up, alternate_up) = changes
    assert forget < -1e-5 and alternate > 1e-5 and forget_up > 1e-5 and alternate_up < -1e-5


def test_preference_says_what_it_needs() -> None:
    model, original, batch = with_alternates("gpt2")
    loss = build_loss("dpo")
    with pytest.raises(DataError, match="'dpo' needs an alternate answer for each forget row: a column 'alternate'"):
        loss(model, {"forget": batch["forget"]}, before(model, original))
    short = {**batch, "alternate": collate(text_rows(3))}
    with pytest.raises(DataError, match="4 forget rows have 3 alternate answers"):
        loss(model, short, before(model, original))
    images = {"forget": collate(image_rows(3)), "alternate": collate(image_rows(3))}
    with pytest.raises(DataError, match="'dpo' compares answers of several tokens; for class labels use"):
        loss(tiny_vit(), images, before(tiny_vit(), tiny_vit()))
    assert {name: kind.alternate_answer for name, kind in LOSSES.items() if kind.alternate_answer} == {
        "dpo": "own", "altpo": "own", "idk": "idk",
    }  # fmt: skip


# Micro-batches


@pytest.mark.parametrize(
    ("name", "case"), [("dpo", "llama"), ("rmu", "gpt2"), ("rmu", "vit"), ("rmu", "bert"), ("random_label", "bert")]
)
def test_micro_batches_with_counts_add_up_to_their_batch(name: str, case: str) -> None:
    make, rows = CASES[case]
    original = make()
    model = moved(original)
    parts_rows = {"forget": rows(4, seed=1), "retain": rows(5, seed=2)}
    if name == "dpo":
        parts_rows["alternate"] = text_rows(4, seed=9, lengths=(5, 8, 4, 6))
    cut = {"forget": 1, "retain": 3, "alternate": 1}
    loss = build_loss(name, {"alpha": 0.7} | ({"layer": 1} if name == "rmu" else {}))
    scope = before(model, original)
    whole = {part: collate(found) for part, found in parts_rows.items()}
    parts = [
        {p: collate(r[: cut[p]]) for p, r in parts_rows.items()},
        {p: collate(r[cut[p] :]) for p, r in parts_rows.items()},
    ]
    counts = [loss.counts(model, part) for part in parts]
    total = {term: sum(count[term] for count in counts) for term in counts[0]}
    assert total == loss.counts(model, whole)
    torch.testing.assert_close(
        sum(loss(model, part, scope, total) for part in parts), loss(model, whole, scope), rtol=1e-5, atol=1e-6
    )
    g_big = gradients(loss(model, whole, scope), model)
    g_sum = sum(gradients(loss(model, part, scope, total), model) for part in parts)
    assert (g_sum - g_big).norm() < 1e-4 * g_big.norm()
    plain = sum(loss(model, part, scope) for part in parts) / len(parts)
    assert abs(plain - loss(model, whole, scope)) > 1e-5


# Hidden states


def states(model: nn.Module, inputs: Batch, layer: int) -> np.ndarray:
    """Outputs of a block at the positions that count, `[N, D]`, by transformers' own list of hidden states."""
    with torch.no_grad():
        found = model(**{k: v for k, v in inputs.items() if k != "labels"}, output_hidden_states=True)
    hidden = found.hidden_states[layer + 1]
    labels = inputs["labels"]
    if labels.ndim == 2:
        return hidden[:, :-1][labels[:, 1:] != -100].numpy()
    mask = inputs.get("attention_mask", torch.ones(hidden.shape[:2])).bool()
    return [row[keep].numpy() for row, keep in zip(hidden, mask, strict=True)]  # a mean per row first


def mean_distance(found: Any, target: Any) -> float:
    if isinstance(found, np.ndarray):
        return reference.distance(found, np.broadcast_to(target, found.shape))
    targets = target if isinstance(target, list) else [np.broadcast_to(target, one.shape) for one in found]
    return float(np.mean([reference.distance(a, b) for a, b in zip(found, targets, strict=True)]))


def direction(width: int, seed: int = 0) -> np.ndarray:
    u = torch.rand(width, generator=torch.Generator().manual_seed(seed)).double().numpy()
    return u / np.sqrt(np.sum(u * u))


@pytest.mark.parametrize("case", HIDDEN)
def test_rmu_equals_its_twin(case: str) -> None:
    make, rows = CASES[case]
    original = make()
    model = moved(original)
    batch = {"forget": collate(rows(4, seed=1)), "retain": collate(rows(3, seed=2))}
    scope = before(model, original)
    found = states(model, batch["forget"], 0)
    width = (found if isinstance(found, np.ndarray) else found[0]).shape[-1]

    def value(**settings: Any) -> float:
        return build_loss("rmu", {"layer": 0, **settings})(model, batch, scope).item()

    twin = mean_distance(found, 2 * direction(width))
    assert value(alpha=0) == pytest.approx(twin, rel=1e-5)
    assert value(alpha=0, coefficient=20, seed=3) == pytest.approx(
        mean_distance(found, 20 * direction(width, 3)), rel=1e-5
    )
    assert abs(value(alpha=0, layer=-1 if case == "vit" else 1) - twin) > 1e-3
    now, then = states(model, batch["retain"], 0), states(original, batch["retain"], 0)
    retain = mean_distance(now, then)
    assert value(gamma=0) == pytest.approx(retain, rel=1e-5) and retain > 1e-4
    assert value(gamma=0.5, alpha=3) == pytest.approx(0.5 * twin + 3 * retain, rel=1e-5)
    likelihood = reference.retain_nll(dense(model, batch["retain"]))
    assert value(gamma=0, retain="nll") == pytest.approx(likelihood, rel=1e-5)


@pytest.mark.parametrize("case", HIDDEN)
def test_steps_down_rmu_bring_the_states_to_the_target_and_lower_the_forget_probability(case: str) -> None:
    make, rows = CASES[case]
    original = make()
    model = copy.deepcopy(original)
    batch = {"forget": memorised(original, collate(rows(4, seed=1)))}
    loss = build_loss("rmu", {"layer": 1, "coefficient": 10.0})
    first = loss(model, batch).item()
    for _ in range(8):
        step(model, loss(model, batch), 0.2)
    assert loss(model, batch).item() < 0.95 * first
    if case in TEXT:  # an untrained classifier may happen to find its label in the direction of the target
        assert forget_likelihood(model, batch) < forget_likelihood(original, batch) - 1e-3


def test_small_steps_down_rmu_lower_the_probability_of_a_real_story() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = requires_asset("stories260K")
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = AutoTokenizer.from_pretrained(folder).encode("Once upon a time, there was a little girl named Lily.")
    batch = {"forget": collate([{"input_ids": tokens, "labels": tokens}])}
    model, loss = copy.deepcopy(original), build_loss("rmu", {"layer": 2})
    for _ in range(3):
        step(model, loss(model, batch), 0.3)
    assert forget_likelihood(model, batch) < forget_likelihood(original, batch) - 1e-3
    assert loss(model, batch) < loss(original, batch)


def test_rmu_trains_no_weight_after_its_layer_but_reaches_all_of_them() -> None:
    model = tiny_llama()
    build_loss("rmu", {"layer": 0})(model, {"forget": collate(text_rows(3))}).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name  # data parallel processes wait for each of them
        after = ".layers.1." in name or name.startswith(("model.norm", "lm_head"))
        assert after == (parameter.grad.abs().max() == 0), name


def test_rmu_layer_is_a_block_or_a_name_and_errors_say_which_there_are() -> None:
    model, batch = tiny_gpt2(), {"forget": collate(text_rows(3))}
    by_name = build_loss("rmu", {"layer": "transformer.h.1"})(model, batch)
    assert torch.equal(by_name, build_loss("rmu", {"layer": 1})(model, batch))
    assert find_module(model, -1) is model.transformer.h[1] and find_module(tiny_vit(), 0) is not None
    assert build_loss("rmu").layer == 7
    with pytest.raises(SettingsError, match="layer is 7, the model has blocks 0 to 1; choose"):
        build_loss("rmu")(model, batch)
    with pytest.raises(SettingsError, match="the model has no module 'h\\.1'"):
        build_loss("rmu", {"layer": "h.1"})(model, batch)
    with pytest.raises(SettingsError, match="no stack of blocks; give layer the name of a module"):
        build_loss("rmu")(tiny_mlp(), {"forget": collate(vector_rows(3))})
    assert torch.isfinite(build_loss("rmu", {"layer": "first"})(tiny_mlp(), {"forget": collate(vector_rows(3))}))
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    model.transformer.wte.requires_grad_(False)
    with pytest.raises(ModelError, match="depends on no trained weight"):
        build_loss("rmu", {"layer": 1})(model, batch)


def test_the_blocks_of_a_model_are_its_outermost_list_of_modules() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(
        nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(2, 2) for _ in range(9))}) for _ in range(3)
    )
    assert find_module(model, 2) is model.layers[2]
    with pytest.raises(SettingsError, match="blocks 0 to 2"):
        find_module(model, 5)


def test_the_blocks_of_an_encoder_decoder_are_its_decoders() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(vocab_size=29, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    assert find_module(model, 1) is model.decoder.block[1]
    inputs = {"input_ids": torch.randint(1, 29, (2, 9)), "labels": torch.randint(1, 29, (2, 4))}
    found = predict(model, inputs, False, 1).hidden
    assert found is not None and found.states_LPD.shape == (8, 1, 16)
    with pytest.raises(ModelError, match=r"outputs \[2, 9, 16\] are not one state for each label position \(4\)"):
        predict(model, inputs, False, "encoder.block.1")
    model.spare = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="layer 'spare' did not run"):
        predict(model, inputs, False, "spare")


def test_any_loss_may_keep_the_hidden_states_of_retain_rows() -> None:
    model, original, batch = with_alternates("llama")
    loss = build_loss("npo", {"gamma": 0, "retain": "hidden", "layer": 1})
    assert loss.original_contents == {"forget": "nll", "retain": "hidden"}
    expected = mean_distance(states(model, batch["retain"], 1), states(original, batch["retain"], 1))
    # transformers' last hidden state is normalised, the block's own output is not
    assert abs(loss(model, batch, before(model, original)).item() - expected) > 1e-3
    loss = build_loss("npo", {"gamma": 0, "retain": "hidden", "layer": 0})
    expected = mean_distance(states(model, batch["retain"], 0), states(original, batch["retain"], 0))
    assert loss(model, batch, before(model, original)).item() == pytest.approx(expected, rel=1e-5)
    assert loss(original, batch, before(original, original)).item() == 0


# Random labels


def drawn(model: nn.Module, batch: Batch, seed: int = 0) -> list[int]:
    """The classes that the loss pulls toward: where its gradient by the logits is negative."""
    predictions = predict(model, batch)
    logits_LV = predictions.logits_LV.detach().requires_grad_()
    free = Predictions(logits_LV, predictions.labels_L, predictions.rows_L, predictions.n_rows, inputs=batch)
    slope_LV = torch.autograd.grad(LOSSES["random_label"].term(free, None, seed=seed).sum(), logits_LV)[0]
    assert ((slope_LV < 0).sum(1) == 1).all()
    return slope_LV.argmin(1).tolist()


@pytest.mark.parametrize(("make", "rows"), [(tiny_vit, image_rows), (tiny_bert, text_class_rows)])
def test_random_label_is_the_cross_entropy_to_another_class(make: Any, rows: Any) -> None:
    model, batch = sharpen(make()), collate(rows(8))
    others = drawn(model, batch)
    assert all(other != label for other, label in zip(others, batch["labels"].tolist(), strict=True))
    twin = np.mean(
        [reference.nll(z, y) for (z, _), y in zip(reference.pairs(dense(model, batch)), others, strict=True)]
    )
    loss = build_loss("random_label")(model, {"forget": batch}).item()
    assert loss == pytest.approx(twin, rel=1e-5)
    assert abs(loss - reference.retain_nll(dense(model, batch))) > 1e-3


def test_random_labels_depend_on_the_row_and_the_seed_alone() -> None:
    model, rows = tiny_bert(), text_class_rows(8)
    whole = drawn(model, collate(rows))
    assert drawn(model, collate(rows[5:])) == whole[5:] and drawn(model, collate(rows[::-1])) == whole[::-1]
    assert drawn(model, collate(rows, side="left")) == whole
    assert drawn(model, collate(rows), seed=1) != whole


def test_random_labels_are_uniform_over_the_other_classes() -> None:
    rows = [row | {"labels": 2} for row in image_rows(800)]
    counts = Counter(drawn(tiny_vit(), collate(rows)))
    assert set(counts) == set(range(CLASSES)) - {2}
    assert all(abs(count - 200) < 4 * np.sqrt(800 * 0.25 * 0.75) for count in counts.values())  # four deviations


@pytest.mark.parametrize(("make", "rows"), [(tiny_vit, image_rows), (tiny_bert, text_class_rows)])
def test_a_small_step_down_random_label_lowers_the_forget_probability(make: Any, rows: Any) -> None:
    original, changes = make(), []
    batch = {"forget": memorised(original, collate(rows(6, seed=1)))}
    for size in (2e-3, -2e-3):
        model = copy.deepcopy(original)
        step(model, build_loss("random_label")(model, batch), size)
        changes.append(forget_likelihood(model, batch) - forget_likelihood(original, batch))
    assert changes[0] < -1e-5 and changes[1] > 1e-5


def test_random_label_is_for_classes() -> None:
    with pytest.raises(
        DataError, match="'random_label' is for rows with a class label; for token labels use next_best"
    ):
        build_loss("random_label")(tiny_gpt2(), {"forget": collate(text_rows(2))})


# The dual weight


def test_dual_weight_rises_while_the_bound_is_broken_and_falls_to_zero_at_most() -> None:
    dual = DualWeight(1.0, eps=0.5, eta=2.0, warmup_epochs=1)
    dual.end_step(3.0, epoch=0.5)
    assert dual.value == 1  # warming up
    seen = []
    for retain in (0.75, 0.5, 0.0, 0.0):
        dual.end_step(retain, epoch=1.5)
        seen.append(dual.value)
    assert seen == [1.5, 1.5, 0.5, 0.0]
    dual.reset()
    assert dual.value == 1.0


def test_dual_weight_warms_up_to_the_end_of_an_epoch() -> None:
    dual = DualWeight(1.0, eps=0.0, warmup_epochs=1)
    for epoch, value in ((0.5, 1.0), (1.0, 1.0), (1.5, 2.0), (2.0, 3.0)):
        dual.end_step(1.0, epoch)
        assert dual.value == value


def test_dual_weight_by_epoch_is_updated_by_the_mean_over_its_steps() -> None:
    dual = DualWeight(1.0, eps=0.5, warmup_epochs=0, update_upon="epoch")
    dual.end_step(1.0, epoch=0.5)
    assert dual.value == 1.0
    dual.end_step(2.0, epoch=1.0)
    assert dual.value == 2.0 and not dual.pending
    dual.end_step(1.0, epoch=1.25)
    assert dual.value == 2.0


def test_dual_weight_comes_back_from_its_state() -> None:
    dual = DualWeight(1.0, eps=0.1, warmup_epochs=0, update_upon="epoch")
    dual.end_step(0.7, 0.5)
    again, fresh = (DualWeight(1.0, eps=0.1, warmup_epochs=0, update_upon="epoch") for _ in range(2))
    again.load_state(json.loads(json.dumps(dual.state())))
    for weight in (dual, again, fresh):
        weight.end_step(0.3, 1.0)
    assert again.value == dual.value == 1.0 + 0.5 - 0.1 != fresh.value


def test_pdu_takes_the_weight_of_the_moment_and_notes_the_retain_loss_of_the_step() -> None:
    model, _, batch = with_alternates("llama")
    loss = build_loss("pdu", {"eps": 0.2, "alpha": 50})
    assert loss.dual is not None and loss.dual.value == 50
    forget, retain = (
        reference.pdu(dense(model, batch["forget"]), []),
        reference.retain_nll(dense(model, batch["retain"])),
    )
    assert loss(model, batch).item() == pytest.approx(forget + 50 * retain, rel=1e-5)
    assert loss.dual.take().item() == pytest.approx(retain, rel=1e-5) and loss.dual.take().item() == 0
    loss.dual.value = 0.0
    assert loss(model, batch).item() == pytest.approx(forget, rel=1e-5)
    assert loss.dual.take().item() == pytest.approx(retain, rel=1e-5)  # a weight of 0 can rise again
    counts = {term: 2 * count for term, count in loss.counts(model, batch).items()}
    for _ in range(2):  # two equal micro-batches
        loss(model, batch, None, counts)
    assert loss.dual.take().item() == pytest.approx(retain, rel=1e-5)


def test_pdu_settings_are_checked() -> None:
    with pytest.raises(SettingsError, match="'pdu' needs the setting eps, a bound on the retain loss"):
        build_loss("pdu")
    with pytest.raises(SettingsError, match="update_upon must be step or epoch, got 'batch'"):
        build_loss("pdu", {"eps": 1, "update_upon": "batch"})
    with pytest.raises(SettingsError, match="eta must be at least 0, got -1"):
        build_loss("pdu", {"eps": 1, "eta": -1})
    with pytest.raises(SettingsError, match="'npo' has no setting 'eps'"):
        build_loss("npo", {"eps": 1})
    with pytest.raises(DataError, match="'pdu' needs retain rows"):
        build_loss("pdu", {"eps": 1})(tiny_gpt2(), {"forget": collate(text_rows(2))})


# Losses of one's own


def likelihood(predictions: Predictions, original: None, *, weight: float = 1.0) -> Tensor:
    return weight * (-predictions.nll_L).exp()


def test_a_function_is_a_loss() -> None:
    model, _, batch = with_alternates("gpt2")
    loss = build_loss(likelihood, {"weight": 2.0})
    assert loss.name == f"{__name__}:likelihood" and not loss.needs_original
    p = [reference.softmax(z)[y] for z, y in reference.pairs(dense(model, batch["forget"]))]
    assert loss(model, batch).item() == pytest.approx(2 * np.mean(p), rel=1e-5)
    assert build_loss(loss) is loss
    with pytest.raises(SettingsError, match="has no setting 'beta', only gamma, alpha, retain, weight"):
        build_loss(likelihood, {"beta": 1})


def test_a_loss_is_named_by_module_and_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_losses_for_test.py").write_text(
        "from hf_unlearn.losses import register_loss\n"
        "def square(predictions, original, *, scale=1.0):\n    return scale * (-2 * predictions.nll_L).exp()\n"
        "@register_loss('own_for_test', unit='row', reads_original='nll')\n"
        "def rise(predictions, original):\n"
        "    return original.sum_by_row(original.nll_L) - predictions.sum_by_row(predictions.nll_L)\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    model, original, batch = with_alternates("gpt2")
    try:
        loss = build_loss("own_losses_for_test:square", {"scale": 3.0})
        p = [reference.softmax(z)[y] for z, y in reference.pairs(dense(model, batch["forget"]))]
        assert loss(model, batch).item() == pytest.approx(3 * np.mean(np.square(p)), rel=1e-5)
        named = build_loss("own_losses_for_test:rise")
        assert named.kind is LOSSES["own_for_test"] and named.needs_original
        assert torch.isfinite(named(model, batch, before(model, original)))
    finally:
        LOSSES.remove("own_for_test")
    with pytest.raises(SettingsError, match="cannot import loss 'own_losses_for_test:nothing'"):
        build_loss("own_losses_for_test:nothing")
    with pytest.raises(SettingsError, match="cannot import loss 'no_such_module_at_all:f': No module named"):
        build_loss("no_such_module_at_all:f")
    with pytest.raises(SettingsError, match="is no function of"):
        build_loss("own_losses_for_test:number")


def test_a_term_with_the_wrong_number_of_values_is_an_error() -> None:
    model, _, batch = with_alternates("gpt2")
    with pytest.raises(SettingsError, match=r"must give one value per label \(\d+ here\), got \[\]"):
        build_loss(lambda predictions, original: predictions.nll_L.mean())(model, batch)
    name = "by_row_for_test"
    try:
        register_loss(name, unit="row")(lambda predictions, original: predictions.nll_L)
        with pytest.raises(SettingsError, match=r"must give one value per row \(4 here\), got \[\d+\]"):
            build_loss(name)(model, batch)
    finally:
        LOSSES.remove(name)


# Labels that cannot be


@pytest.mark.parametrize(("make", "rows", "wrong"), [(tiny_vit, image_rows, CLASSES), (tiny_vit, image_rows, -3)])
def test_a_label_outside_the_classes_is_an_error(make: Any, rows: Any, wrong: int) -> None:
    batch = collate([row | {"labels": wrong if i == 1 else 0} for i, row in enumerate(rows(3))])
    with pytest.raises(DataError, match=rf"label {wrong} is none of the model's 5 classes \(0 to 4\)"):
        predict(make(), batch)


def test_a_row_longer_than_the_context_is_an_error() -> None:
    batch = collate(text_rows(2, lengths=(33,)))
    with pytest.raises(DataError, match="a row has 33 tokens, the model's context is 32; lower max_length"):
        predict(tiny_gpt2(), batch)
    assert torch.isfinite(predict(tiny_llama(), batch).logits_LV).all()  # whose context is 64


def test_labels_that_do_not_fit_the_logits_are_an_error() -> None:
    batch = collate(image_rows(3))
    with pytest.raises(ModelError, match=r"gives logits \[3, 5\] for labels \[3, 5\]"):
        predict(tiny_vit(), {**batch, "labels": torch.zeros(3, 5, dtype=torch.long)})


def test_losses_run_on_a_real_model() -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(requires_asset("stories260K"), dtype=torch.float32).eval()
    rows = text_rows(3, lengths=(9, 12, 8))
    batch = {
        "forget": collate(rows),
        "retain": collate(text_rows(2, seed=1)),
        "alternate": collate(text_rows(3, seed=2)),
    }
    original = copy.deepcopy(model)
    for name, settings in (("dpo", {}), ("rmu", {"layer": 2})):
        found = gradients(build_loss(name, settings)(model, batch, before(model, original)), model)
        assert torch.isfinite(found).all() and found.abs().max() > 0


def test_made_up_predictions_have_no_extras() -> None:
    assert made_up().hidden is None and made_up().alternate is None and made_up().inputs is None
