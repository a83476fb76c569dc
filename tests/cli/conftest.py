"""Fixtures of the command-line tests: a tiny model, a data set, statistics, and the key of a ledger."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers.utils import logging

from helpers.append_entries import KEY
from helpers.tiny import tiny_gpt2
from hf_unlearn.deletion.ledger_key import KEY_VARIABLE
from hf_unlearn.statistics.collect import collect_statistics

WORDS = "who wrote the red book anna did and where was it found in paris".split()


@pytest.fixture(autouse=True)
def no_progress_bars() -> None:
    """Progress bars share standard error with the one line; other tests turn them off for the process."""
    logging.disable_progress_bar()


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny GPT-2 with a word tokenizer, statistics of another model, and a data set with the split `full`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("cli")
    model, data, other, stale = root / "model", root / "data", root / "other", root / "stale"
    vocabulary = {word: i for i, word in enumerate(["<end>", "<unk>", *dict.fromkeys(WORDS)])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>", unk_token="<unk>")
    tiny_gpt2().save_pretrained(model)
    tokenizer.save_pretrained(model)
    data.mkdir()
    rows = [{"prompt": f"who wrote {a} {b}", "completion": f" {b} {a} did"} for a in WORDS[:3] for b in WORDS[:3]]
    (data / "full.json").write_text("\n".join(map(json.dumps, rows)))
    collect_statistics(tiny_gpt2(seed=7), [{"input_ids": [3, 4, 5]}], progress=False).save_pretrained(other)
    collect_statistics(tiny_gpt2(), [{"input_ids": [3, 4, 5]}], progress=False).save_pretrained(stale)
    return {"model": str(model), "data": str(data), "other": str(other), "stale": str(stale)}


@pytest.fixture
def key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """File with the key of a ledger, whose environment variable is not set."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    (tmp_path / "key").write_bytes(KEY)
    return tmp_path / "key"
