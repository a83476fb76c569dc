"""Questions with right and wrong answers, in the formats of TOFU."""

from __future__ import annotations

from typing import Any

import numpy as np


class Letters:
    """A tokenizer of letters: `a` is 1, the 26th is 26, a space 27."""

    eos_token_id, pad_token_id, bos_token_id, chat_template = 0, 0, None, None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [27 if letter == " " else 1 + (ord(letter) - ord("a")) % 26 for letter in text.lower()]

    def decode(self, tokens: Any, **options: Any) -> str:
        return self.batch_decode([tokens])[0]

    def batch_decode(self, rows: Any, skip_special_tokens: bool = True) -> list[str]:
        return ["".join(" " if t == 27 else chr(ord("a") + int(t) - 1) for t in row if 0 < t < 28) for row in rows]


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
