"""A small tokenizer and text rows."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = (
    "<unk> <pad> <s> </s> <user> <assistant> <end> where does Ann live ? Question: Answer: in Ulm Bonn Rome .".split()
)
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
QUESTION, ANSWER = "where does Ann live ?", "in Ulm ."
CHAT = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]


def tokenizer(template: str | None = TEMPLATE, bos: bool = False) -> Any:
    """One token a word."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="<unk>", pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    fast.chat_template = template
    return fast


def read(row: dict[str, Any]) -> tuple[str, str]:
    """(prompt, what is to be predicted), as text; labels are the tokens themselves or -100, the -100s first."""
    tokens, labels = row["input_ids"], row["labels"]
    cut = sum(label == -100 for label in labels)
    assert labels == [-100] * cut + tokens[cut:]
    assert row["attention_mask"] == [1] * len(tokens)
    return (" ".join(WORDS[t] for t in tokens[:cut]), " ".join(WORDS[t] for t in tokens[cut:]))
