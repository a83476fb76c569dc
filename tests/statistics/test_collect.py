"""Laws of collecting: the sums equal slow twins, whatever batching and padding, and the model is not changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers import dense_twin as reference
from helpers import tiny as cases
from hf_unlearn.data.batches import PaddingCollator
from hf_unlearn.data.row_identity import batch_hashes
from hf_unlearn.errors import DataError, ModelError, SettingsError
from hf_unlearn.models.layers import find_layers
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.statistics.fisher import sample_labels
from hf_unlearn.statistics.hooks import record_inputs
from hf_unlearn.statistics.retain_statistics import RetainStatistics


def collect(model: nn.Module, rows: Sequence[cases.Row], **settings: Any) -> RetainStatistics:
    return collect_statistics(model, rows, **({"progress": False, "batch_size": 3} | settings))


def double_rows(kind: str, n: int) -> list[cases.Row]:
    rows = cases.CASES[kind][1](n)
    return [r | {"pixel_values": r["pixel_values"].double()} if "pixel_values" in r else r for r in rows]


def assert_same_sums(a: RetainStatistics, b: RetainStatistics, tolerance: float = 1e-9) -> None:
    assert a.layers == b.layers and a.positions == b.positions
    assert (a.rows, a.labels, a.data, a.weights) == (b.rows, b.labels, b.data, b.weights)
    for ours, theirs in ((a.gram_sums, b.gram_sums), (a.fisher_sums, b.fisher_sums)):
        assert list(ours) == list(theirs)
        for name in ours:
            assert relative(ours[name], theirs[name]) < tolerance, name


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("kind", cases.CASES)
def test_the_grams_equal_the_loop_over_positions_of_each_row_run_alone(kind: str) -> None:
    model, rows = cases.CASES[kind][0]().double(), double_rows(kind, 4)
    statistics = collect(model, rows)
    for name in find_layers(model):
        rows_NI = reference.input_rows(model, rows, name)
        twin_II = reference.gram_sum(rows_NI) / len(rows_NI)
        assert statistics.positions[statistics.layers[name].inputs] == len(rows_NI)
        np.testing.assert_allclose(statistics.gram(name), twin_II, atol=1e-9 * np.abs(twin_II).max())
    control_II = reference.gram_sum(reference.input_rows(model, rows[:3], name)) / len(rows_NI)
    assert np.abs(statistics.gram(name).numpy() - control_II).max() > 1e-3 * np.abs(twin_II).max()


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert", "mlp"])
def test_the_fishers_equal_autograd_label_by_label(kind: str) -> None:
    model, rows = cases.CASES[kind][0]().double(), double_rows(kind, 2)
    statistics = collect(model, rows, fisher=True)
    for name in list(find_layers(model))[-4:]:
        twin_OO, labels = 0.0, 0
        other_OO = 0.0
        for row in rows:
            own = row["labels"]
            positions = None if isinstance(own, int) else [t - 1 for t in range(1, len(own)) if own[t] != -100]
            seed = batch_hashes(reference._alone(row))[0]
            one_OO, count = reference.fisher_sum(model, row, name, positions, seed)
            twin_OO, labels = twin_OO + one_OO, labels + count
            other_OO = other_OO + reference.fisher_sum(model, row, name, positions, seed + 1)[0]
        assert statistics.labels == labels
        scale = np.abs(twin_OO).max()
        np.testing.assert_allclose(statistics.fisher_sums[name], twin_OO, atol=1e-4 * scale)
        assert (
            np.abs(statistics.fisher_sums[name].numpy() - other_OO).max() > 1e-2 * scale
        )  # other labels, other Fisher
        assert statistics.positions_per_label(name) == statistics.positions[statistics.layers[name].inputs] / labels


@pytest.mark.parametrize("kind", cases.CASES)
def test_batch_size_changes_nothing(kind: str) -> None:
    model, rows = cases.CASES[kind][0]().double(), double_rows(kind, 6)
    one, all_ = (collect(model, rows, batch_size=size, fisher=True) for size in (1, 6))
    assert_same_sums(one, all_, 1e-5)  # the logits of the Fisher are float32
    assert_same_sums(collect(model, rows, batch_size=1), collect(model, rows, batch_size=4))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(side: str) -> None:
    model, rows = cases.tiny_llama().double(), cases.text_rows(4)  # rotary positions are relative
    padded = collect(model, rows, batch_size=4, collator=PaddingCollator(side=side), fisher=True)
    assert_same_sums(padded, collect(model, rows, batch_size=1, fisher=True), 1e-5)


def test_padding_on_the_left_changes_nothing_with_learnt_positions_given() -> None:
    model, rows = cases.tiny_gpt2().double(), cases.text_rows(4)

    def collator(batch: Sequence[cases.Row]) -> dict[str, Tensor]:
        inputs = PaddingCollator(side="left")(batch)
        return inputs | {"position_ids": (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)}

    assert_same_sums(collect(model, rows, batch_size=4, collator=collator), collect(model, rows, batch_size=1))


def test_without_its_mask_padding_does_change_the_gram() -> None:
    model, rows = cases.tiny_llama().double(), cases.text_rows(4)

    def collator(batch: Sequence[cases.Row]) -> dict[str, Tensor]:
        inputs = PaddingCollator()(batch)
        return inputs | {"attention_mask": torch.ones_like(inputs["attention_mask"])}

    unmasked, masked = collect(model, rows, batch_size=4, collator=collator), collect(model, rows, batch_size=4)
    key = "model.layers.0.self_attn.o_proj"  # the padding's own embedding is zero; attention fills it
    assert unmasked.positions[key] == 36 and masked.positions[key] == 26
    assert relative(unmasked.gram_sums[key], masked.gram_sums[key]) > 1e-2


def test_masked_labels_do_not_mask_inputs() -> None:
    model = cases.tiny_gpt2().double()
    short, long, none = (cases.text_rows(4, **kw) for kw in ({"prompt": 1}, {"prompt": 3}, {"labels": False}))
    assert_same_sums(collect(model, short), collect(model, long))
    assert_same_sums(collect(model, short), collect(model, none))
    fishers = [collect(model, rows, fisher=True) for rows in (short, long, none)]
    assert [f.labels for f in fishers] == [22, 14, 22]  # they do say where the model predicts; without: everywhere
    assert (
        relative(fishers[0].fisher_sums["transformer.h.0.mlp.c_fc"], fishers[1].fisher_sums["transformer.h.0.mlp.c_fc"])
        > 0.01
    )


def test_llama_has_four_grams_for_seven_layers_of_a_block() -> None:
    statistics = collect(cases.tiny_llama(), cases.text_rows(3), fisher=True)
    assert (len(statistics.layers), len(statistics.gram_sums), len(statistics.fisher_sums)) == (14, 8, 14)
    for block in range(2):
        owner = {
            n.rsplit(".", 1)[1]: s.inputs.rsplit(".", 1)[1] for n, s in statistics.layers.items() if f".{block}." in n
        }
        assert owner == {
            "q_proj": "q_proj",
            "k_proj": "q_proj",
            "v_proj": "q_proj",
            "o_proj": "o_proj",
            "gate_proj": "gate_proj",
            "up_proj": "gate_proj",
            "down_proj": "down_proj",
        }


def test_a_gram_is_shared_only_where_the_inputs_are_the_same_tensor() -> None:
    class Two(nn.Module):
        def __init__(self, copy: bool) -> None:
            super().__init__()
            self.a, self.b, self.copy = nn.Linear(3, 2), nn.Linear(3, 2), copy

        def forward(self, pixel_values: Tensor) -> Tensor:
            first = self.a(pixel_values)
            if self.copy:
                pixel_values.mul_(2)  # the same object with another content
            return first + self.b(pixel_values)

    rows = [{"pixel_values": torch.randn(3)} for _ in range(4)]
    assert set(collect(Two(False), rows).gram_sums) == {"a"}
    changed = collect(Two(True), rows)
    assert set(changed.gram_sums) == {"a", "b"}
    torch.testing.assert_close(changed.gram_sums["b"], 4 * changed.gram_sums["a"])


def test_a_layer_that_runs_twice_is_counted_twice() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.Linear(3, 3)

        def forward(self, pixel_values: Tensor) -> Tensor:
            return self.cell(self.cell(pixel_values))

    statistics = collect(Recurrent(), [{"pixel_values": torch.randn(3)} for _ in range(5)], fisher=True)
    assert statistics.positions == {"cell": 10} and statistics.rows == 5


def test_a_layer_that_the_prediction_does_not_depend_on_has_a_zero_fisher() -> None:
    class Unused(cases.MLP):
        def __init__(self) -> None:
            super().__init__()
            self.third = nn.Linear(6, 2)

        def forward(self, pixel_values: Tensor, **ignored: Any) -> Tensor:
            self.third(pixel_values)
            return super().forward(pixel_values)

    statistics = collect(Unused(), cases.vector_rows(3), fisher=True)
    assert statistics.fisher("third").shape == (2, 2) and not statistics.fisher("third").any()
    assert statistics.fisher("second").any()


def test_sums_are_float64_also_for_a_half_precision_model() -> None:
    model = cases.tiny_mlp().bfloat16()
    rows = [r | {"pixel_values": r["pixel_values"].bfloat16()} for r in cases.vector_rows(4)]
    statistics = collect(model, rows, fisher=True)
    assert {t.dtype for t in (*statistics.gram_sums.values(), *statistics.fisher_sums.values())} == {torch.float64}
    exact_II = reference.gram_sum(np.stack([r["pixel_values"].double().numpy() for r in rows]))
    atol = 1e-12 * np.abs(exact_II).max()  # float64's rounding, not bf16's 1e-2
    np.testing.assert_allclose(statistics.gram_sums["first"], exact_II, rtol=0, atol=atol)


def test_max_rows_takes_the_first_rows() -> None:
    model, rows = cases.tiny_mlp().double(), double_rows("mlp", 7)
    assert_same_sums(collect(model, rows, max_rows=4), collect(model, rows[:4]))
    assert_same_sums(collect(model, rows, max_rows=99), collect(model, rows))
    assert collect(model, rows, max_rows=4).data != collect(model, rows).data


def test_layers_restricts_the_sums() -> None:
    statistics = collect(cases.tiny_llama(), cases.text_rows(2), layers=["*.k_proj", "*.v_proj"], fisher=True)
    assert list(statistics.gram_sums) == [f"model.layers.{i}.self_attn.k_proj" for i in range(2)]
    assert len(statistics.layers) == len(statistics.fisher_sums) == 4


def state_of(model: nn.Module) -> tuple:
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    gradients = [p.grad is None for p in model.parameters()]
    return hooks, [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()], gradients


class Breaks(cases.MLP):
    """Fails in the second forward pass, after the first layer has run."""

    calls, seen = 0, ()

    def forward(self, pixel_values: Tensor, **ignored: Any) -> Tensor:
        self.calls += 1
        self.seen = state_of(self)
        hidden = self.first(pixel_values)
        if self.calls == 2:
            raise RuntimeError("broken")
        return self.second(hidden)


@pytest.mark.parametrize("fisher", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_hooks_modes_and_flags_are_restored(fisher: bool, fails: bool) -> None:
    model = Breaks().train()
    model.second.eval()
    model.first.bias.requires_grad_(False)
    before, weights = state_of(model), [p.clone() for p in model.parameters()]
    rows = cases.vector_rows(6 if fails else 3)
    if fails:
        with pytest.raises(RuntimeError, match="broken"):
            collect(model, rows, fisher=fisher)
    else:
        collect(model, rows, fisher=fisher)
    assert state_of(model) == before
    assert model.seen[:3] != before[:3] and not any(model.seen[1]) and not any(model.seen[2])  # they differed inside
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert torch.is_grad_enabled()


def test_record_inputs_removes_its_hooks_on_an_error() -> None:
    model, seen = cases.tiny_mlp(), []
    with pytest.raises(KeyError), record_inputs(find_layers(model), lambda name, x: seen.append(name)):
        model(torch.randn(2, 6))
        raise KeyError
    model(torch.randn(2, 6))
    assert seen == ["first", "second"]


def test_collecting_leaves_the_random_state_alone() -> None:
    model, rows = cases.tiny_mlp(5), cases.vector_rows(4)
    before = torch.get_rng_state()
    collect(model, rows, fisher=True)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    assert not torch.equal(torch.get_rng_state(), before)


def test_dropout_is_off_while_collecting() -> None:
    model, rows = cases.tiny_gpt2(dropout=0.5).train(), cases.text_rows(3)
    assert_same_sums(collect(model, rows), collect(model, rows))


def test_the_progress_bar_can_be_off(capsys: pytest.CaptureFixture[str]) -> None:
    model, rows = cases.tiny_mlp(), cases.vector_rows(4)
    collect(model, rows)
    assert capsys.readouterr().err == ""
    collect(model, rows, progress=True)
    assert "Collecting" in (text := capsys.readouterr().err) and "4/4" in text


def test_labels_are_drawn_from_the_softmax() -> None:
    logits_LV = torch.tensor([[0.0, 2.0, -1.0, 1.0]]).expand(4000, 4)
    uniforms_L = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    shares_V = torch.bincount(sample_labels(logits_LV, uniforms_L), minlength=4) / 4000
    torch.testing.assert_close(shares_V, logits_LV[0].softmax(0), atol=5e-4, rtol=0)
    assert (shares_V - torch.full((4,), 0.25)).abs().max() > 0.1


def test_labels_of_zero_probability_are_never_drawn() -> None:
    logits_LV = torch.tensor([[-torch.inf, 0.0, -torch.inf]]).expand(3, 3)
    assert sample_labels(logits_LV, torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)).tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("rows", "settings", "error", "seen"),
    [
        ([], {}, DataError, "statistics set is empty"),
        (None, {}, DataError, "statistics set is empty"),
        ([{"strange": 1}], {}, DataError, r"columns \['strange'\]"),
        ([{"text": "hello"}], {}, DataError, "pass the model's tokenizer"),
        (cases.vector_rows(2), {"batch_size": 0}, SettingsError, "at least 1, got 0"),
        (cases.vector_rows(2), {"max_rows": 0}, SettingsError, "got 3 and 0"),
        (cases.vector_rows(2), {"layers": ["third"]}, ModelError, "'third' matches none of the 2"),
    ],
)
def test_bad_input_raises_a_one_line_error(rows: Any, settings: dict, error: type[Exception], seen: str) -> None:
    model = cases.tiny_mlp()
    with pytest.raises(error, match=seen) as caught:
        collect(model, rows, **settings)
    assert "\n" not in str(caught.value)


def test_errors_name_what_cannot_be_collected() -> None:
    with pytest.raises(ModelError, match="no linear layer"):
        collect(nn.Sequential(nn.Bilinear(1, 2, 3)), cases.image_rows(2))
    with pytest.raises(ModelError, match="lm_head has a tied weight"):
        collect(cases.tiny_gpt2(), cases.text_rows(2), layers=["lm_head"])
    with pytest.raises(ModelError, match=r"second has 20000 outputs.*leave it out"):
        model = cases.tiny_mlp()
        model.second = nn.Linear(8, 20000)
        collect(model, cases.vector_rows(2), fisher=True, sketch_above=None)


def test_a_layer_that_never_ran_is_an_error() -> None:
    model = cases.tiny_mlp()
    model.third = nn.Linear(2, 2)
    with pytest.raises(ModelError, match=r"third .* never ran"):
        collect(model, cases.vector_rows(2))
