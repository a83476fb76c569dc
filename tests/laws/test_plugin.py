"""The plug-in law: what a module outside the package registers goes through every command, with no edit inside it.

`helpers/outside_plugin.py` defines a layer type, a constraint, a loss, a metric and an attack. The commands run in
processes of their own, which learn of it from `--plugin` alone.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.command_lines import FINISHED
from helpers.commands import PEOPLE, tiny_model
from helpers.paths import HELPERS, ROOT, TESTS

PLUGIN = HELPERS / "outside_plugin.py"
NAMES = ("outside_inverse", "outside_confidence", "outside_worst_loss", "outside_shrinking")


def command(*line: str, code: int | None = None) -> Any:
    """The JSON document that a command prints in a process of its own; by default one that is done."""
    codes = (code,) if code is not None else FINISHED if line[0] == "run" else (0,)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "hf_unlearn", *line, "--json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode in codes, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the plug-in's model and a tokenizer of the data's words."""
    program = (
        "import sys; from pathlib import Path; from transformers import AutoTokenizer\n"
        "from helpers.outside_plugin import OutsideConfig, OutsideForCausalLM\n"
        "folder = sys.argv[1]; size = len(AutoTokenizer.from_pretrained(folder))\n"
        "import torch; torch.manual_seed(0)\n"
        "OutsideForCausalLM(OutsideConfig(vocab_size=size, eos_token_id=0, pad_token_id=0)).save_pretrained(folder)"
    )
    folder = tiny_model(tmp_path_factory.mktemp("outside") / "model")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{TESTS}"}
    subprocess.run([sys.executable, "-c", program, str(folder)], env=environment, check=True)
    return folder


def rows(out: Path) -> list[str]:
    few = {"train": "people[0:8]", "forget": "people[0:4]", "holdout": "people[20:24]", "output_dir": str(out / "out")}
    few |= {"cache_dir": str(out / "cache"), "use_cpu": "True", "disable_tqdm": "True"}
    flags = [part for name, value in few.items() for part in (f"--{name}", value)]
    return ["--dataset_name", str(PEOPLE), *flags]


def test_run_and_the_card_know_a_layer_type_a_constraint_a_loss_and_a_metric(model: Path, tmp_path: Path) -> None:
    line = ["run", "--model_name_or_path", str(model), *rows(tmp_path), "--num_train_epochs", "2"]
    line += [
        "--constraint",
        "outside_inverse",
        "--loss",
        "outside_confidence",
        "--metrics",
        "default,outside_worst_loss",
    ]
    report = command(*line, "--plugin", str(PLUGIN))["reports"]["outside_inverse"]
    assert report["method"]["constraint"] == "outside_inverse" and report["method"]["steps"] == 2
    assert report["method"]["constraint_settings"] == {"share": 0.1}
    assert {"blocks.0", "blocks.1"} <= set(report["drift"]["by_layer"])  # the layer type has statistics
    values = {(m["name"], m["split"], m["model"]): m["value"] for m in report["metrics"]}
    assert values["outside_worst_loss", "forget", "unlearned"] > values["outside_worst_loss", "forget", "original"]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    for name in ("outside_inverse", "outside_confidence", "outside_worst_loss"):
        assert name in re.sub(r"\\", "", card), name
    assert "Steps multiplied by the inverse of the Gram" in card  # the constraint's own words


def test_estimate_counts_an_unknown_layer_type_and_constraint(model: Path) -> None:
    line = ["estimate", str(model), "--max_length", "16", "--batch_size", "2", "--loss", "outside_confidence"]
    ours = command(*line, "--constraint", "outside_inverse", "--plugin", str(PLUGIN))
    none = command(*line, "--constraint", "none", "--plugin", str(PLUGIN))
    assert ours["layers"] == 2 and ours["memory"]["held"]["constraint"] > none["memory"]["held"]["constraint"] == 0


def test_a_grid_runs_methods_constraints_and_attacks_of_a_plugin(model: Path, tmp_path: Path) -> None:
    line = ["benchmark", "text", "--model_name_or_path", str(model), *rows(tmp_path), "--num_train_epochs", "1"]
    line += ["--task", "language-model", "--methods", "outside_confidence", "--constraints", "outside_inverse,none"]
    line += ["--metrics", "answer_probability,outside_worst_loss", "--attacks", "outside_shrinking", "--seeds", "0"]
    line += ["--fine_tune", "False", "--retrained", "none", "--use_retain_rows", "False"]
    command(*line, "--plugin", str(PLUGIN))
    table = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    assert "outside_confidence" in table and "outside_inverse" in table
    cells = [json.loads(path.read_text()) for path in (tmp_path / "out" / "cells").glob("*.json")]
    assert len(cells) == 2
    for cell in cells:
        assert {"outside_worst_loss", "shrunken_probability"} <= {metric["name"] for metric in cell["metrics"]}


@pytest.mark.parametrize("name", NAMES)
def test_without_the_plugin_its_names_are_unknown(name: str, tmp_path: Path) -> None:
    """Negative control: the package knows none of the names."""
    words = " ".join(path.read_text(encoding="utf-8") for path in (ROOT / "hf_unlearn").rglob("*.py"))
    assert name not in words
