"""Laws of secrets: a row's mask is 1 on the tokens with a character of its secret, in its answers and nowhere else, for
every format and kind of tokenizer, and no model, identity or other answer sees it. Each law has a negative control."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast

from helpers.questions import letters
from helpers.texts import tokenizer as words
from helpers.tiny import collate, requires_asset, tiny_gpt2, tiny_llama
from hf_unlearn.data.batches import ContentCollator, PaddingCollator, own_batches
from hf_unlearn.data.encoded_checks import check_encoded
from hf_unlearn.data.encoding import encode_dataset
from hf_unlearn.data.pairs import PairedCollator, PairedDataset
from hf_unlearn.data.row_identity import batch_hashes, labelled_batch_hashes, labelled_row_hash, row_hash
from hf_unlearn.errors import DataError
from hf_unlearn.models.arguments import taken_inputs
from hf_unlearn.models.forward import predict
from hf_unlearn.models.loading import load_tokenizer
from hf_unlearn.statistics.collect import collect_statistics

ENDED = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
SPECIAL = ["<unk>", "<s>", "</s>"]


def bpe(pieces: list[str], merges: list[tuple[str, str]], split: Any) -> Any:
    core = Tokenizer(models.BPE({t: i for i, t in enumerate([*SPECIAL, *pieces])}, merges, unk_token="<unk>"))
    core.pre_tokenizer, core.post_processor = split, ENDED
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


class Slow:
    """A tokenizer that does not say which characters a token has."""

    def __init__(self, fast: Any):
        self.fast, self.eos_token_id, self.chat_template = fast, fast.eos_token_id, None
        self.all_special_ids, self.unk_token_id = fast.all_special_ids, fast.unk_token_id

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return self.fast.encode(text, add_special_tokens=add_special_tokens)

    def __call__(self, text_target: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": self.encode(text_target)}


PIECES = [*"abdehilmnorsuwAIRUWé?.,", "Ul", "in"]
MERGES = [("U", "l"), ("i", "n")]
BYTES = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ul", "in"]
TOKENIZERS: dict[str, Any] = {
    "bytes": lambda: bpe(BYTES, MERGES, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "metaspace": lambda: bpe(["▁", *PIECES], MERGES, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "slow bytes": lambda: Slow(TOKENIZERS["bytes"]()),
    "slow metaspace": lambda: Slow(TOKENIZERS["metaspace"]()),
    "letters": letters,
}


def marked(row: dict[str, Any], tokenizer: Any) -> str:
    """The text of the tokens that are content."""
    kept = [token for token, is_content in zip(row["labels"], row["content_mask"], strict=True) if is_content]
    assert all(token >= 0 for token in kept)
    pieces = "".join(getattr(tokenizer, "fast", tokenizer).convert_ids_to_tokens(kept))
    return pieces.replace("▁", " ").replace("Ġ", " ").strip()


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize(
    ("answer", "secret", "expected"),
    [
        (" in Ulm.", "Ulm", "Ulm"),
        (" Ulm, in Ulm.", "Ulm", "UlmUlm"),
        (" in Ulm", "Ulm", "Ulm"),  # the end token is not content
        (" in Ulm and in Rom.", ["Rom", "Ulm"], "UlmRom"),
        (" in Ulm and in Rom.", "Ulm and in Rom", "Ulm and in Rom"),
        (" in Ulm.", "  Ulm\n", "Ulm"),
        (" anana", "ana", "anana"),  # occurrences overlap
    ],
)
def test_the_mask_is_on_the_tokens_of_the_secret(name: str, answer: str, secret: Any, expected: str) -> None:
    tokenizer = TOKENIZERS[name]()
    given = {"prompt": "where is Ulm?", "completion": answer}
    (row,) = encode_dataset([{**given, "secret": secret}], tokenizer)
    (plain,) = encode_dataset([given], tokenizer)
    assert {key: row[key] for key in plain} == plain and set(row) - set(plain) == {"content_mask", "secret"}
    expected = expected.lower() if name == "letters" else expected
    assert marked(row, tokenizer).replace(" ", "") == expected.replace(" ", "")
    assert sum(row["content_mask"]) < sum(label != -100 for label in row["labels"])  # negative control: not all


@pytest.mark.parametrize("name", ["bytes", "slow bytes"])
def test_every_byte_of_a_character_is_content(name: str) -> None:
    (row,) = encode_dataset([{"prompt": "a", "completion": " b é d", "secret": "é"}], TOKENIZERS[name]())
    assert sum(row["content_mask"]) in (2, 3)  # with its space, if that belongs to the same token


def test_a_word_tokenizer_marks_words_in_a_chat_and_in_plain_rows() -> None:
    chat = [{"role": "user", "content": "where does Ann live ?"}, {"role": "assistant", "content": "in Ulm ."}]
    longer = [*chat, {"role": "user", "content": "in Ulm ?"}, {"role": "assistant", "content": "in Ulm in Bonn ."}]
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"messages": chat, "secret": "Ulm"}, ["Ulm"]),
        ({"messages": longer, "secret": ["Ulm", "Bonn"]}, ["Ulm", "Ulm", "Bonn"]),  # not that of the user
        ({"question": "where does Ann live ?", "answer": "in Ulm .", "secret": "in Ulm"}, ["in", "Ulm"]),
        ({"prompt": chat[:1], "completion": chat[1:], "secret": "Ulm"}, ["Ulm"]),
        ({"text": "Ann live in Ulm", "secret": "Ulm"}, ["Ulm"]),
    ]
    for raw, expected in cases:
        (row,) = encode_dataset([raw], words())
        found = [t for t, is_content in zip(row["labels"], row["content_mask"], strict=True) if is_content]
        assert words().convert_ids_to_tokens(found) == expected, raw
    unnamed = {"text": "Ann live in Ulm", "secret": None}
    assert "content_mask" not in encode_dataset([unnamed], words())[0]


def test_a_real_tokenizer_marks_a_secret() -> None:
    tokenizer = load_tokenizer(str(requires_asset("stories260K")))
    (row,) = encode_dataset([{"prompt": "The dog was", "completion": " called Zorro.", "secret": "Zorro"}], tokenizer)
    assert marked(row, tokenizer).strip() == "Zorro"


def test_an_encoder_decoder_has_a_mask_as_long_as_its_labels() -> None:
    tokenizer = TOKENIZERS["bytes"]()
    raw = [{"source": "where is Rom, and Ulm?", "target": "in Ulm.", "secret": "Ulm"}]
    for given in (tokenizer, Slow2Seq(tokenizer)):
        (row,) = encode_dataset(raw, given, task="seq2seq")
        assert len(row["content_mask"]) == len(row["labels"]) != len(row["input_ids"])
        assert marked(row, tokenizer) == "Ulm"
    with pytest.raises(DataError, match="cut at max_length"):
        encode_dataset(raw, tokenizer, task="seq2seq", max_length=3)


class Slow2Seq(Slow):
    """A slow tokenizer of an encoder-decoder."""

    def __call__(self, text: str | None = None, text_target: str | None = None, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        return dict(self.fast(text=text, text_target=text_target, **options))


# Refused


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"secret": "Bonn"}, "row 1 of the forget set has a secret that does not occur in its answer: 'Bonn'"),
        ({"secret": "ulm"}, "does not occur in its answer: 'ulm'; copy it from the answer, with the same letters"),
        ({"secret": "where"}, "does not occur in its answer"),  # it is in the prompt
        ({"secret": ["Ulm", "Bonn"]}, "does not occur in its answer: 'Bonn'"),
        ({"secret": 7}, "row 1 of the forget set has 7 in column 'secret'; give a text of its answer, or a list"),
        ({"secret": ["Ulm", 7]}, "has 7 in column 'secret', not a text"),
        ({"secret": " "}, "has an empty text in column 'secret'"),
    ],
)
def test_a_secret_that_the_answer_does_not_have_is_one_clear_line(raw: dict[str, Any], message: str) -> None:
    row = {"question": "where does Ann live ?", "answer": "in Ulm ."}
    with pytest.raises(DataError, match=message) as error:
        encode_dataset([row, {**row, **raw}], words(), what="forget")
    assert "\n" not in str(error.value)


def test_a_secret_that_is_not_predicted_is_refused() -> None:
    with pytest.raises(DataError, match="only in tokens that are not predicted"):
        encode_dataset([{"text": "Ulm is where Ann does live", "secret": "Ulm"}], words())
    row = {"prompt": "where ?", "completion": " in in in Ulm", "secret": "Ulm"}
    with pytest.raises(DataError, match="only in tokens that are not predicted"):
        encode_dataset([row], words(None), max_length=4)
    assert sum(encode_dataset([row], words(None), max_length=6)[0]["content_mask"]) == 1  # negative control


def test_other_tasks_ignore_a_column_secret() -> None:
    (row,) = encode_dataset([{"text": "in Ulm", "label": 0, "secret": "Bonn"}], words(), task="text-classification")
    assert "content_mask" not in row and "secret" not in row


def test_other_answers_need_not_have_the_secret() -> None:
    raw = {"question": "where ?", "answer": "in Ulm .", "secret": "Ulm", "alternate": "in Bonn ."}
    raw |= {"perturbed_answer": ["in Rome ."], "paraphrased_answer": "live in Bonn"}
    (row,) = encode_dataset([raw], words(None))
    others = [row["alternate"], *row["alternatives"]["wrong"], row["alternatives"]["paraphrase"]]
    assert sum(row["content_mask"]) == 1 and all("content_mask" not in other for other in others)


# Who sees it


def masked_rows() -> list[dict[str, Any]]:
    raw = [
        {"prompt": "where ?", "completion": answer, "secret": "Ulm"} for answer in (" in Ulm", " live in Ulm in Bonn")
    ]
    return [dict(row) for row in encode_dataset(raw, words(None))]


def test_the_mask_is_no_part_of_a_rows_identity() -> None:
    rows = masked_rows()
    plain = [{name: value for name, value in row.items() if name != "content_mask"} for row in rows]
    assert [*map(row_hash, rows)] == [*map(row_hash, plain)]
    assert [*map(labelled_row_hash, rows)] == [*map(labelled_row_hash, plain)]
    for hashes in (batch_hashes, labelled_batch_hashes):
        assert hashes(collate(rows)) == hashes(collate(plain))
        assert hashes(collate(rows)) != hashes(collate(rows[::-1]))  # negative control
    raw = {"question": "where ?", "answer": "Ulm"}
    assert row_hash(raw) == row_hash({**raw, "secret": "Ulm"}) != row_hash({**raw, "note": "Ulm"})


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama])
def test_predictions_know_which_labels_are_content(make: Any, side: str) -> None:
    rows, model = masked_rows(), make()
    batch = collate(rows, side)
    for skip_first in (False, True):
        predictions = predict(model, batch, skip_first)
        expected = []
        for row in rows:
            answer = [bool(c) for label, c in zip(row["labels"], row["content_mask"], strict=True) if label != -100]
            expected += answer[1:] if skip_first and len(answer) > 2 else answer
        assert predictions.content_L is not None and predictions.content_L.tolist() == expected
        assert any(expected) and not all(expected)
    plain = {name: tensor for name, tensor in batch.items() if name != "content_mask"}
    without = predict(model, plain)
    assert without.content_L is None and torch.equal(without.logits_LV, predict(model, batch).logits_LV)


def test_no_model_gets_the_mask() -> None:
    class Takes(torch.nn.Module):
        """A model that takes any argument."""

        def forward(self, **inputs: Any) -> Any:
            return inputs

    batch = collate(masked_rows())
    assert set(taken_inputs(Takes(), batch)) == {"input_ids", "attention_mask", "labels"}
    with pytest.raises(DataError, match=r"content_mask \[2, 3\] for labels"):
        predict(tiny_gpt2(), {**batch, "content_mask": batch["content_mask"][:, :3]})


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_collator_of_transformers_makes_the_same_batch(side: str) -> None:
    tokenizer, rows = words(None), masked_rows()
    tokenizer.padding_side = side
    theirs = ContentCollator(DataCollatorForSeq2Seq(tokenizer))(rows)
    mine = PaddingCollator(pad_token_id=tokenizer.pad_token_id, side=side)(rows)
    assert all(torch.equal(theirs[name], mine[name]) for name in ("input_ids", "labels", "content_mask"))
    with pytest.raises((ValueError, DataError)):  # negative control: it does not pad the mask itself
        DataCollatorForSeq2Seq(tokenizer)([{k: v for k, v in row.items() if k != "secret"} for row in rows])
    with pytest.raises(DataError, match="use one that only pads them"):
        ContentCollator(lambda rows: {"labels": torch.tensor([[1, 2]])})(rows)
    some = [rows[0], {name: value for name, value in rows[1].items() if name != "content_mask"}]
    assert "content_mask" not in ContentCollator(PaddingCollator())(some)


def test_pairs_and_statistics_read_rows_with_secrets_through_any_collator() -> None:
    tokenizer, rows = words(None), masked_rows()
    pairs = PairedDataset(rows, rows)
    for collator in (DataCollatorForSeq2Seq(tokenizer), PaddingCollator(tokenizer.pad_token_id)):
        batch = PairedCollator(collator)([pairs[0], pairs[1]])
        assert {"input_ids", "labels", "content_mask"} <= set(batch["forget"])
        ((whole, _),) = own_batches(rows, collator, 2)
        assert whole["content_mask"].shape == whole["labels"].shape
        assert collect_statistics(tiny_llama(), rows, collator=collator, progress=False).layers


def test_only_the_mask_becomes_a_tensor() -> None:
    rows = [{**row, "content_phrases": [], "content_rule": "secret"} for row in masked_rows()]
    assert set(collate(rows)) == {"input_ids", "attention_mask", "labels", "content_mask"}
    others = [{**row, "numbers": []} for row in masked_rows()]  # negative control: an empty list may be numbers
    assert "numbers" in collate(others)


def test_a_mask_of_another_length_than_the_labels_is_refused() -> None:
    row = {"input_ids": [1, 2, 3], "labels": [-100, 2, 3], "content_mask": [0, 1]}
    with pytest.raises(DataError, match="row 0 of the forget set has 3 labels and 2 content_mask"):
        check_encoded([row], "forget", tiny_gpt2())
    check_encoded([{**row, "content_mask": np.array([0, 1, 0])}], "forget", tiny_gpt2())
