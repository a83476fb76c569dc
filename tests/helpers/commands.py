"""Running commands on a tiny model and the invented people."""

from __future__ import annotations

import io
import json
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import hf_unlearn
from helpers.command_lines import FINISHED
from hf_unlearn.cli import main

PEOPLE = Path(hf_unlearn.__file__).parent / "demo"
ROWS = [json.loads(line) for line in (PEOPLE / "people.jsonl").read_text(encoding="utf-8").splitlines()]


def tiny_model(folder: Path, tied: bool = False) -> Path:
    """A Llama of two layers with a tokenizer of the data's words."""
    torch.manual_seed(0)
    splitter = pre_tokenizers.Whitespace()
    texts = ["Question Answer :", *(text for row in ROWS for text in row.values())]
    found = dict.fromkeys(word for text in texts for word, _ in splitter.pre_tokenize_str(text))
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<end>", *found])}, unk_token="<end>"))
    words.pre_tokenizer = splitter
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=words.get_vocab_size(),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def said(argv: list[str], code: int | None = None) -> Any:
    """The JSON that a command answers; by default a command that is done, whatever the outcome of a run."""
    codes = (code,) if code is not None else FINISHED if argv[0] == "run" else (0,)
    with redirect_stdout(io.StringIO()) as out:
        assert main([*argv, "--json"]) in codes
    return json.loads(out.getvalue())
