"""The Python blocks of the README and the documentation run as printed (with a small local language model)."""

import re
from pathlib import Path

import pytest
from helpers.paths import ROOT
from helpers.tiny import requires_asset

README = ROOT / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def block_with(text: str) -> str:
    """Return the only block that contains `text`."""
    (match,) = [block for block in BLOCKS if text in block]
    return match


def test_the_table_of_losses_has_all_of_them() -> None:
    from hf_unlearn.losses import LOSSES

    table = README.read_text(encoding="utf-8").partition("| `loss` |")[2].partition("\n\n")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    assert sorted(re.findall(r"`(\w+)`", " ".join(first_cells))) == sorted(LOSSES)


def test_signature_block_holds() -> None:
    exec(compile(block_with("EnergyConstraint(1.0)"), "README signature", "exec"), {})


def test_signature_block_fails_without_the_constraint() -> None:
    code = block_with("EnergyConstraint(1.0)").replace("EnergyConstraint(1.0))", "None)")
    with pytest.raises(AssertionError):
        exec(compile(code, "README signature", "exec"), {})


def test_register_layer_block_gives_a_layer_that_is_protected() -> None:
    import torch

    from hf_unlearn import EnergyConstraint, collect_statistics, constrain_optimizer, freeze_unprotected

    scope: dict = {}
    exec(compile(block_with("@register_layer"), "README register_layer", "exec"), scope)
    torch.manual_seed(0)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = scope["Scaled"](6, 2)

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return self.layer(pixel_values)

    model, retain, forget = Model(), torch.randn(2, 6), torch.randn(1, 6)
    statistics = collect_statistics(model, [{"pixel_values": row} for row in retain], progress=False)
    torch.testing.assert_close(statistics.gram_sums["layer"], (9 * retain.T @ retain).double(), rtol=1e-5, atol=1e-5)
    assert freeze_unprotected(model, statistics.layers).protected == ("layer.weight",)
    optimizer = constrain_optimizer(
        torch.optim.SGD([model.layer.weight], lr=1.0), model, statistics, EnergyConstraint(1.0)
    )
    before = model(retain).detach(), model(forget).detach()
    model(forget).sum().backward()
    optimizer.step()
    assert (model(retain) - before[0]).abs().max() < 1e-5
    assert (model(forget) - before[1]).abs().max() > 1e-2


def test_twenty_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    code = block_with(MODEL).replace(MODEL, str(requires_asset("stories260K")))
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README example", "exec"), {})
    assert "membership_auc" in capsys.readouterr().out
    assert (tmp_path / "unlearned" / "model.safetensors").is_file()
