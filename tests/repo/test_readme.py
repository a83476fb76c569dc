"""The Python blocks of the README and the documentation run as printed (with a small local language model)."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import ROOT
from helpers.tiny import requires_asset

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "recipes").rglob("*.md")]
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def blocks_of(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def block_with(text: str) -> str:
    """Return the only block of the README and the documentation that contains `text`."""
    (match,) = [block for page in PAGES for block in blocks_of(page) if text in block]
    return match


def broken_links(page: Path, text: str) -> list[str]:
    """Links of a page to files and headings of this repository that do not exist."""
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not path.exists() or (anchor and anchor not in anchors_of(path.read_text(encoding="utf-8"))):
            broken.append(f"{page.relative_to(ROOT)}: {target}")
    return broken


def anchors_of(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page: Path) -> None:
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


def test_the_search_finds_a_broken_link() -> None:
    text = "[a](README.md#no-such-heading) [b](nowhere.md) [c](README.md#constraints) [d](https://example.org)"
    assert broken_links(README, text) == ["README.md: README.md#no-such-heading", "README.md: nowhere.md"]


def test_examples_of_extensions_run() -> None:
    code = "\n".join(blocks_of(ROOT / "docs" / "extending.md"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def names_in_table(page: Path, header: str) -> list[str]:
    """Return the code words in the first column of the table with this header, in alphabetical order."""
    table = page.read_text(encoding="utf-8").partition(header)[2].partition("\n\n")[0]
    first_cells = [line.split("|")[1] for line in table.splitlines()[2:]]
    return sorted(re.findall(r"`(\w+)`", " ".join(first_cells)))


def test_the_tables_have_every_loss_constraint_metric_and_attack() -> None:
    from hf_unlearn.constraints import CONSTRAINTS
    from hf_unlearn.evaluation import ATTACKS, METRICS
    from hf_unlearn.losses import LOSSES

    metrics = ROOT / "docs" / "metrics.md"
    assert names_in_table(README, "| `loss` |") == sorted(LOSSES)
    assert names_in_table(README, "| `constraint` |") == sorted(CONSTRAINTS)
    assert names_in_table(metrics, "| metric |") == sorted(METRICS)
    assert names_in_table(metrics, "| attack |") == sorted({*ATTACKS, "membership"})


def test_contributing_has_the_rooms_and_the_number_of_arrows() -> None:
    program = [sys.executable, str(ROOT / "tests" / "repo" / "import_arrows.py")]
    printed = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for line in printed.splitlines()[:-2]:
        floor, room, words = re.match(r" *(\d+)  (\S+) +(.*?) +-> ", line).groups()  # type: ignore[union-attr]
        assert f"| {floor} | `{room}` | {words} |" in page
    counts = re.match(r"(\d+) rooms on (\d+) floors, (\d+) arrows", printed.splitlines()[-2])
    assert counts is not None and f"| version 0.2 | {counts[1]} | {counts[2]} | {counts[3]} |" in page


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
