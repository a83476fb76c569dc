"""Laws of tokens: a row's tokens are those of its joined text for every kind of tokenizer, labels begin at the first
token with a character of the answer, and end tokens stand only at the end. Each law has a negative control."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from helpers.texts import tokenizer
from helpers.tiny import requires_asset
from hf_unlearn.data.encoding import encode_dataset
from hf_unlearn.data.tokens import RowText, after_others, shared_length, tokens_of_parts
from hf_unlearn.models.loading import load_tokenizer

LETTERS = "acdeorlu:?"
ENDED = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])


def bpe(vocabulary: list[str], merges: list[tuple[str, str]], split: Any, ended: bool = False) -> Any:
    words = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *vocabulary])}
    core = Tokenizer(models.BPE(words, merges, unk_token="<unk>"))
    core.pre_tokenizer = split
    if ended:
        core.post_processor = ENDED
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


class Slow:
    """A tokenizer that does not say which characters a token has."""

    def __init__(self, fast: Any):
        self.fast, self.eos_token_id, self.chat_template = fast, fast.eos_token_id, None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.fast.encode(text, add_special_tokens=add_special_tokens)


METASPACE = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
WHOLE = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
TOKENIZERS: dict[str, Any] = {
    "letters": lambda ended: bpe(["▁", *LETTERS], [], METASPACE, ended),
    "bytes": lambda ended: bpe(["Ġ", *LETTERS, "Ġr"], [("Ġ", "r")], BYTES, ended),
    "merging": lambda ended: bpe(["Ġ", *LETTERS, ":r", "re"], [(":", "r"), ("r", "e")], WHOLE, ended),
}
ROWS = [("colour:", "red"), ("colour: ", "red"), ("colour:", " red"), ("colour?", "ada")]


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("ended", [False, True])
@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(("prompt", "answer"), ROWS)
def test_tokens_are_those_of_the_joined_text(name: str, ended: bool, slow: bool, prompt: str, answer: str) -> None:
    fast = TOKENIZERS[name](ended)
    given = Slow(fast) if slow else fast
    (row,) = encode_dataset([{"prompt": prompt, "completion": answer}], given)
    whole = fast.encode(prompt + answer)
    expected = whole if ended else [*whole, fast.eos_token_id]
    assert row["input_ids"] == expected and row["input_ids"].count(fast.eos_token_id) == 1
    n_labels = sum(label != -100 for label in row["labels"])
    assert row["labels"] == [-100] * (len(expected) - n_labels) + expected[-n_labels:]
    predicted = "".join(fast.convert_ids_to_tokens(expected[-n_labels:]))
    letters = predicted.replace("</s>", "").replace("Ġ", "").replace("▁", "")
    assert letters in (answer.strip(), ":" + answer.strip())  # a token may have a character of both


def test_the_parts_tokenized_apart_are_other_tokens() -> None:  # negative control
    fast = TOKENIZERS["letters"](False)
    assert fast.encode("colour:") + fast.encode("red") != fast.encode("colour:red")
    ended = TOKENIZERS["letters"](True)
    assert (ended.encode("colour:") + ended.encode("red")).count(ended.eos_token_id) == 2


def test_a_token_of_prompt_and_answer_is_a_label() -> None:
    fast = TOKENIZERS["merging"](False)
    (row,) = encode_dataset([{"prompt": "colour:", "completion": "red"}], fast)
    assert fast.convert_ids_to_tokens(label for label in row["labels"] if label != -100) == [":r", "e", "d", "</s>"]
    slow = encode_dataset([{"prompt": "colour:", "completion": "red"}], Slow(fast))
    assert slow[0] == row


def test_alternate_answers_follow_the_prompt_as_the_answer_does() -> None:
    fast = TOKENIZERS["bytes"](False)
    for name, start in (("completion", " "), ("gt", " "), ("completion", "")):
        row = {"prompt": "colour:", name: f"{start}red", "alternate": "dear"}
        (encoded,) = encode_dataset([row], fast)
        (other,) = encode_dataset([{"prompt": "colour:", name: f"{start}dear"}], fast)
        assert encoded["alternate"] == other and encoded["input_ids"] != other["input_ids"]


def test_parts_in_the_middle_are_marked() -> None:
    fast = TOKENIZERS["bytes"](False)
    tokens, chosen = tokens_of_parts("ada: red: dora", [(0, 3), (5, 8)], fast, special=False)
    picked = [t for t, is_in in zip(fast.convert_ids_to_tokens(tokens), chosen, strict=True) if is_in]
    assert picked == ["a", "d", "a", "Ġr", "e", "d"]
    assert tokens_of_parts("ada: red: dora", [(0, 3), (5, 8)], Slow(fast), special=False) == (tokens, chosen)


@pytest.mark.parametrize(("left", "right", "length"), [("", "a", 0), ("ab", "ab", 2), ("abc", "abd", 2), ("b", "a", 0)])
def test_shared_length(left: str, right: str, length: int) -> None:
    assert shared_length(left, right) == shared_length(list(left), list(right)) == length


# Rows after other rows


@pytest.mark.parametrize("template", [True, False])
@pytest.mark.parametrize("bos", [True, False])
def test_rows_after_others_are_the_tokens_of_the_joined_text(template: bool, bos: bool) -> None:
    words = tokenizer(bos=bos) if template else tokenizer(template=None, bos=bos)
    raw = [{"question": "where does Ann live ?", "answer": city} for city in ("in Ulm", "in Bonn .", "Rome")]
    texts = [RowText.of(row, words) for row in encode_dataset(raw, words)]
    assert all(text is not None for text in texts)
    row = after_others(texts[:2], texts[2], words)  # type: ignore[arg-type]
    read = words.convert_ids_to_tokens(row["input_ids"])
    assert read.count("<s>") == (bos and not template) and read.count("</s>") == (not template)
    answer = [token for token in row["labels"] if token != -100]
    assert words.decode(answer) == ("Rome <end>" if template else "Rome </s>")
    if not template:
        joined = "\n\n".join(f"Question: {other['question']}\nAnswer: {other['answer']}" for other in raw)
        assert row["input_ids"] == [*words.encode(joined), words.eos_token_id]


def test_a_real_tokenizer_makes_the_tokens_of_the_joined_text() -> None:
    words = load_tokenizer(str(requires_asset("stories260K")))
    raw = [{"prompt": f"Ada{space}", "completion": f"{n} lives"} for n, space in enumerate(("", " ", "\n", "é"))]
    texts = [RowText.of(row, words) for row in encode_dataset(raw, words)]
    joined = "\n\n".join(row["prompt"] + row["completion"] for row in raw)
    row = after_others(texts[:-1], texts[-1], words)  # type: ignore[arg-type]
    assert row["input_ids"] == [*words.encode(joined), words.eos_token_id]
    apart = [token for given in encode_dataset(raw, words) for token in given["input_ids"]]
    assert row["input_ids"] != apart
    assert words.decode([token for token in row["labels"] if token != -100]) == "3 lives</s>"


def test_a_row_whose_text_has_other_tokens_has_none() -> None:
    words = tokenizer(template=None)
    good = encode_dataset([{"text": "in Ulm"}], words)[0]
    assert RowText.of(good, words) is not None
    assert RowText.of(good | {"input_ids": [100, *good["input_ids"][1:]]}, words) is None
