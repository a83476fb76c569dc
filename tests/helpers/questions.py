"""Questions with right and wrong answers, in the formats of TOFU."""

from __future__ import annotations

from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def letters() -> PreTrainedTokenizerFast:
    """A tokenizer of letters: `a` is 1, the 26th is 26, a space 27; all other characters are `z`."""
    vocabulary = {"<end>": 0, **{chr(ord("a") + i): 1 + i for i in range(26)}, " ": 27}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="z"))
    tokens.normalizer = normalizers.Lowercase()
    tokens.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokens.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<end>", pad_token="<end>")


def questions(n: int, seed: int = 0, paraphrase: bool = True) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)

    def word(length: int = 4) -> str:
        return "".join(chr(97 + i) for i in rng.integers(0, 26, length))

    rows: list[dict[str, Any]] = []
    for index in range(n):
        row: dict[str, Any] = {"prompt": word(3), "completion": word(5)}
        row |= {"perturbed_answer": [word() for _ in range(2 + index % 2)]}
        rows.append(row | ({"paraphrased_answer": word(6)} if paraphrase else {}))
    return rows


def tofu_splits() -> dict[str, list[dict[str, Any]]]:
    names = {"forget": True, "retain": True, "real_authors_perturbed": False, "world_facts": False}
    found = {name: questions(5, seed, paraphrase) for seed, (name, paraphrase) in enumerate(names.items())}
    return found | {"holdout": [{k: row[k] for k in ("prompt", "completion")} for row in questions(6, 9)]}
