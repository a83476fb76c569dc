"""Folders that tests read."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS, RECIPES = ROOT / "tests", ROOT / "recipes"
HELPERS, PROGRAMS = TESTS / "helpers", TESTS / "helpers" / "programs"
ASSETS = Path(os.environ.get("HF_UNLEARN_ASSETS") or ROOT.parent / "shared" / "assets")
