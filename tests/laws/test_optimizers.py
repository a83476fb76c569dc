"""Every `optim=` of TrainingArguments: which hold the guarantee, and which are refused, as docs/methods.md says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers.training_args import OptimizerNames

from helpers.paths import ROOT
from helpers.tiny import tiny_llama
from helpers.training import moved, settings
from hf_unlearn.errors import SettingsError

TABLE = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")


def row(title: str) -> set[str]:
    found = re.search(rf"^\| {title} \| (.+) \|$", TABLE, re.MULTILINE)
    assert found is not None, title
    return set(found[1].split(", "))


HOLDS, REFUSED = row("the guarantee above holds"), row("refused by name")
EXTRA = row("it holds, with packages of their own")
NOT_RUN = row("not run: they need another device or an abandoned package")


@pytest.mark.parametrize("optim", sorted(name.value for name in OptimizerNames))
def test_each_optimizer_is_in_the_row_where_it_belongs(optim: str, tmp_path: Path) -> None:
    if optim in NOT_RUN:
        pytest.skip(f"{optim} cannot be run here")
    if optim in REFUSED:
        with pytest.raises(SettingsError, match="choose another") as raised:
            settings(tmp_path, optim=optim)
        assert "\n" not in str(raised.value)
        return
    assert optim in HOLDS | EXTRA
    targets = {"optim_target_modules": ["q_proj"]} if "galore" in optim or "apollo" in optim else {}
    args = settings(tmp_path, optim=optim, learning_rate=3e-3, relative_step=False, weight_decay=0.1, **targets)
    try:
        retain, forget, _ = moved(tiny_llama(), args)
    except (ImportError, ValueError) as error:
        assert optim in EXTRA and re.search("install|import", str(error)), error
        pytest.skip(f"{optim} needs a package that is not here")
    assert retain < 1e-5 and forget > 1e-2


def test_every_name_of_the_table_exists_once() -> None:
    rows = (HOLDS, EXTRA, REFUSED, NOT_RUN)
    assert set().union(*rows) == {name.value for name in OptimizerNames} and all(rows)
    assert sum(map(len, rows)) == len(set().union(*rows))
