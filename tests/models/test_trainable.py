"""Laws of coverage: every parameter is protected, frozen or named as exposed; nothing trains by oversight."""

from __future__ import annotations

from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn

from helpers import tiny as cases
from hf_unlearn.errors import CoverageError
from hf_unlearn.models.layers import find_layers
from hf_unlearn.models.trainable import check_covered, freeze_unprotected

FROZEN_MATRICES = {
    "gpt2": {"transformer.wte.weight", "transformer.wpe.weight"},
    "llama": {"model.embed_tokens.weight", "lm_head.weight"},
    "bert": {f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")},
    "vit": {
        "vit.embeddings.cls_token",
        "vit.embeddings.position_embeddings",
        "vit.embeddings.patch_embeddings.projection.weight",
    },
    "mlp": set(),
}


@pytest.mark.parametrize("kind", cases.CASES)
def test_by_default_linear_weights_train_and_all_else_is_frozen(kind: str) -> None:
    model = cases.CASES[kind][0]()
    coverage = freeze_unprotected(model, find_layers(model))
    assert set(coverage.protected) == {f"{name}.weight" for name in find_layers(model)}
    parameters = dict(model.named_parameters())
    assert {name for name in coverage.frozen if parameters[name].ndim > 1} == FROZEN_MATRICES[kind]
    assert all(parameters[name].ndim <= 1 for name in set(coverage.frozen) - FROZEN_MATRICES[kind])
    assert coverage.exposed == ()
    assert sorted((*coverage.protected, *coverage.frozen)) == sorted(parameters)
    assert {name for name, p in parameters.items() if p.requires_grad} == set(coverage.protected)


def test_everything_uncovered_is_named_and_nothing_is_changed() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 4), nn.Linear(4, 4))
    with pytest.raises(CoverageError) as caught:
        freeze_unprotected(model, ["2"])
    assert "trainable but without statistics: 0.weight, 3.weight; freeze them" in str(caught.value)
    assert "allow_exposed=('0.weight', ...)" in str(caught.value)
    assert "2.weight" not in str(caught.value) and "bias" not in str(caught.value)
    assert all(p.requires_grad for p in model.parameters())


def test_an_exposed_parameter_trains_and_is_named_in_the_summary() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(72, 4))
    coverage = freeze_unprotected(model, ["2"], allow_exposed=("0.*",))
    assert coverage.exposed == ("0.weight", "0.bias") and model[0].weight.requires_grad and model[0].bias.requires_grad
    assert coverage.summary() == "1 protected, 1 frozen, 2 exposed (0.weight, 0.bias)"
    assert freeze_unprotected(model, ["2"], freeze=("0.*",)).summary() == "1 protected, 3 frozen, 0 exposed"


def test_freezing_wins_over_protection_and_exposure() -> None:
    model = cases.tiny_mlp()
    coverage = freeze_unprotected(model, find_layers(model), allow_exposed=("second.*",), freeze=("*.weight",))
    assert coverage.protected == () and coverage.exposed == ("second.bias",)
    assert not model.first.weight.requires_grad and not model.second.weight.requires_grad


def test_what_was_frozen_stays_frozen() -> None:
    model = cases.tiny_mlp()
    model.first.weight.requires_grad_(False)
    coverage = freeze_unprotected(model, find_layers(model), allow_exposed=("first.*",))
    assert "first.weight" in coverage.frozen and not model.first.weight.requires_grad


@pytest.mark.parametrize("setting", ["allow_exposed", "freeze"])
def test_a_pattern_that_matches_nothing_is_an_error(setting: str) -> None:
    model = cases.tiny_mlp()
    with pytest.raises(CoverageError, match=r"'thrid\.\*' matches no parameter, such as 'first\.weight'"):
        freeze_unprotected(model, find_layers(model), **{setting: ("first.*", "thrid.*")})
    assert all(p.requires_grad for p in model.parameters())


def test_tied_embeddings_are_frozen_however_they_are_named() -> None:
    class Tied(nn.Module):
        def __init__(self, tie: bool) -> None:
            super().__init__()
            self.table, self.head = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
            if tie:
                self.head.weight = self.table.weight

    assert freeze_unprotected(Tied(True), []).frozen == ("table.weight",)
    with pytest.raises(CoverageError, match=r"table\.weight, head\.weight"):
        freeze_unprotected(Tied(False), [])
    assert "lm_head.weight" in freeze_unprotected(cases.tiny_llama(tied=False), *_protected()).frozen
    coverage = freeze_unprotected(cases.tiny_llama(tied=True), *_protected())
    assert "model.embed_tokens.weight" in coverage.frozen and "lm_head.weight" not in coverage.frozen  # one parameter


def _protected() -> tuple[list[str]]:
    return (list(find_layers(cases.tiny_llama())),)


def test_an_optimizer_with_an_uncovered_parameter_is_refused() -> None:
    model = cases.tiny_mlp()
    trained = list(model.parameters())
    with pytest.raises(CoverageError, match=r"statistics: first\.bias, second\.bias; call freeze_unprotected"):
        check_covered(model, trained, find_layers(model), ())
    check_covered(model, trained, find_layers(model), ("*.bias",))
    freeze_unprotected(model, find_layers(model))
    check_covered(model, trained, find_layers(model), ())
    with pytest.raises(CoverageError, match="a parameter of another model"):
        check_covered(model, [nn.Parameter(torch.ones(1))], find_layers(model), ())


def test_patterns_are_case_sensitive() -> None:
    assert not fnmatchcase("First.weight", "first.*")
    model = cases.tiny_mlp()
    with pytest.raises(CoverageError, match="matches no parameter"):
        freeze_unprotected(model, find_layers(model), freeze=("First.*",))


class Bilinear(nn.Module):
    """A linear layer, and a layer of an unknown type."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Bilinear(4, 4, 3)


def test_weights_of_an_unknown_layer_type_are_frozen_with_a_warning_that_shows_the_way_out() -> None:
    model = Bilinear()
    with pytest.warns(
        UserWarning, match=r"1 weights .*Bilinear; the first is second\.weight.*register_layer\(Bilinear"
    ):
        coverage = freeze_unprotected(model, ["first"])
    assert coverage.protected == ("first.weight",) and not model.second.weight.requires_grad
    assert coverage.explain().splitlines() == [
        "1 protected, 3 frozen, 0 exposed",
        "frozen, a bias, norm or other vector: first.bias, second.bias",
        "frozen, of an unknown layer type: Bilinear: second.weight",
    ]


def test_no_warning_for_what_is_frozen_or_exposed_by_name(recwarn: pytest.WarningsRecorder) -> None:
    assert "second.weight" in freeze_unprotected(Bilinear(), ["first"], allow_exposed=("second.weight",)).exposed
    assert "second.weight" in freeze_unprotected(Bilinear(), ["first"], freeze=("second.*",)).frozen
    assert not recwarn.list


def test_tied_weights_are_explained() -> None:
    model = cases.tiny_llama(tied=True)
    coverage = freeze_unprotected(model, find_layers(model))
    assert "frozen, tied (lm_head.weight): model.embed_tokens.weight" in coverage.explain()
