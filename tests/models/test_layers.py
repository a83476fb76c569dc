"""Laws of layers: which are found and which are left out, and gradients are in the span of the recorded rows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from helpers import dense_twin as reference
from helpers import tiny as cases
from hf_unlearn.errors import ModelError, SettingsError
from hf_unlearn.models.layers import (
    LAYER_TYPES,
    Layer,
    describe_layer,
    find_layers,
    register_layer,
    tied_parameters,
)

TEXT = ("gpt2", "llama")


@pytest.mark.parametrize("kind", cases.CASES)
def test_every_weight_gradient_lies_in_the_span_of_the_recorded_rows(kind: str) -> None:
    make_model, make_rows = cases.CASES[kind]
    model, rows = make_model().double(), _as_double(make_rows(2))
    layers = find_layers(model)
    for row in rows:
        output = model(**reference._alone(row))
        reference._logits(output).log_softmax(-1)[..., 0].sum().backward()
    checked = 0
    for name, module in layers.items():
        layer = describe_layer(module)
        assert layer is not None
        gradient_OI = layer.weight_OI(module.weight.grad).numpy()
        assert gradient_OI.shape == (layer.outputs, layer.inputs)
        rows_NI = reference.input_rows(model, rows, name)
        outside_II = reference.energy_projector(rows_NI, 1.0)
        assert np.linalg.norm(gradient_OI @ outside_II) <= 1e-6 * np.linalg.norm(gradient_OI) + 1e-12
        if layer.inputs > len(rows_NI):  # control: a random matrix does leave the span, where there is anything outside
            random_OI = np.random.default_rng(0).normal(size=gradient_OI.shape)
            assert np.linalg.norm(random_OI @ outside_II) > 0.1 * np.linalg.norm(random_OI)
            checked += 1
    assert checked


def _as_double(rows: list[cases.Row]) -> list[cases.Row]:
    return [r | {"pixel_values": r["pixel_values"].double()} if "pixel_values" in r else r for r in rows]


@pytest.mark.parametrize("kind", cases.CASES)
def test_the_description_gives_the_sizes_and_the_linear_map(kind: str) -> None:
    model = cases.CASES[kind][0]()
    for module in find_layers(model).values():
        layer = describe_layer(module)
        assert layer is not None
        weight_OI = layer.weight_OI(module.weight.detach())
        assert weight_OI.shape == (layer.outputs, layer.inputs)
        x = torch.randn(3, layer.inputs)
        bias = 0 if module.bias is None else module.bias
        torch.testing.assert_close(module(x), x @ weight_OI.T + bias)


def test_conv1d_is_transposed_and_linear_is_not() -> None:
    attention = cases.tiny_gpt2().transformer.h[0].attn.c_attn
    conv, linear = describe_layer(attention), describe_layer(nn.Linear(32, 96))
    assert conv is not None and linear is not None
    assert (conv.outputs, conv.inputs, conv.transposed) == (96, 32, True)
    assert (linear.outputs, linear.inputs, linear.transposed) == (96, 32, False)


def test_writing_to_the_view_writes_to_the_weight() -> None:
    weight = torch.zeros(2, 3)
    layer = describe_layer(cases.tiny_gpt2().transformer.h[0].attn.c_attn)
    assert layer is not None
    layer.weight_OI(weight)[2, 1] = 7.0
    assert weight[1, 2] == 7.0


def test_other_modules_are_not_described() -> None:
    for module in (
        nn.Embedding(3, 4, max_norm=1.0),
        nn.LayerNorm(4),
        nn.Conv1d(1, 2, 3),
        nn.ConvTranspose2d(1, 2, 3),
        nn.ReLU(),
    ):
        assert describe_layer(module) is None


@pytest.mark.parametrize(
    ("kind", "count"), [("gpt2", 8), ("llama", 14), ("bert", 14), ("vit", 13), ("mlp", 2)]
)  # GPT-2: 4 a block; Llama: 7; BERT: 6, pooler, classifier; ViT: 6, patches, classifier
def test_all_linear_layers_of_the_blocks_and_the_classifiers_are_found(kind: str, count: int) -> None:
    model = cases.CASES[kind][0]()
    layers = find_layers(model)
    assert len(layers) == count
    assert "lm_head" not in layers
    assert [n for n, m in model.named_modules() if m in layers.values()] == list(layers)


def test_patterns_choose_layers() -> None:
    model = cases.tiny_llama()
    assert set(find_layers(model, ["*.mlp.*"])) == {n for n in find_layers(model) if ".mlp." in n}
    assert list(find_layers(model, ["model.layers.1.*.q_proj"])) == ["model.layers.1.self_attn.q_proj"]
    assert "lm_head" in find_layers(model, ["lm_head"])  # left out by default, but not tied: may be asked for


def test_a_pattern_that_matches_nothing_is_an_error_that_names_it_and_a_layer() -> None:
    with pytest.raises(ModelError, match=r"'\*\.c_attn' matches none of the 15 linear layers, such as 'model\.layers"):
        find_layers(cases.tiny_llama(), ["*.mlp.*", "*.c_attn"])


def test_a_tied_layer_is_left_out_and_asking_for_it_is_an_error() -> None:
    model = cases.tiny_llama(tied=True)
    assert tied_parameters(model) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head" not in find_layers(model)
    with pytest.raises(
        ModelError, match=r"lm_head has a tied weight \(lm_head\.weight = model\.embed_tokens\.weight\)"
    ):
        find_layers(model, ["lm_head"])
    assert tied_parameters(cases.tiny_llama()) == {}


def test_two_tied_linear_layers_are_both_left_out() -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    assert list(find_layers(model)) == ["c"]


def test_a_model_without_linear_layers_is_an_error_that_says_what_it_has() -> None:
    with pytest.raises(ModelError, match="Sequential has no linear layer, only Bilinear"):
        find_layers(nn.Sequential(nn.Bilinear(1, 2, 3), nn.ReLU()))


class MyLinear(nn.Module):
    """A linear layer of a type that is not registered."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 5))


def my_linear(module: MyLinear) -> Layer:
    return Layer(outputs=3, inputs=5)


@pytest.fixture
def registered() -> Iterator[None]:
    register_layer(MyLinear)(my_linear)
    yield
    LAYER_TYPES.remove(MyLinear)


def test_a_new_layer_type_is_one_registration(registered: None) -> None:
    class Derived(MyLinear):
        pass

    assert list(find_layers(nn.Sequential(MyLinear(), Derived()))) == ["0", "1"]
    LAYER_TYPES.remove(MyLinear)
    assert describe_layer(MyLinear()) is None and describe_layer(Derived()) is None


def test_the_closest_registered_type_counts(registered: None) -> None:
    class Derived(MyLinear):
        pass

    @register_layer(Derived)
    def derived(module: Derived) -> Layer:
        return Layer(outputs=5, inputs=3, transposed=True)

    layers = [describe_layer(module) for module in (MyLinear(), Derived())]
    assert [layer is not None and layer.transposed for layer in layers] == [False, True]
    LAYER_TYPES.remove(Derived)


def test_a_layer_type_is_registered_once(registered: None) -> None:
    register_layer(MyLinear)(my_linear)  # the same function again changes nothing
    with pytest.raises(SettingsError, match="layer type MyLinear is registered already; remove it first"):
        register_layer(MyLinear)(lambda module: None)
    with pytest.raises(SettingsError, match="layer type Linear is registered already"):
        register_layer(nn.Linear)(lambda module: None)
    assert describe_layer(MyLinear()) == Layer(outputs=3, inputs=5)


def test_a_built_in_type_clashes_before_any_look_up() -> None:
    """In a fresh process, where no layer was looked up yet."""
    code = (
        "from torch import nn; from hf_unlearn.errors import SettingsError; "
        "from hf_unlearn.models.layers import describe_layer, register_layer\n"
        "try: register_layer(nn.Linear)(lambda module: None)\n"
        "except SettingsError: assert describe_layer(nn.Linear(2, 3)).outputs == 3\n"
        "else: raise SystemExit(1)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_conv1d_is_known_before_any_model_was_searched() -> None:
    """As when statistics are loaded in a fresh process, before `find_layers` ran."""
    code = (
        "from transformers.pytorch_utils import Conv1D; from hf_unlearn.models.layers import describe_layer; "
        "layer = describe_layer(Conv1D(6, 4)); assert (layer.outputs, layer.inputs, layer.transposed) == (6, 4, True)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
