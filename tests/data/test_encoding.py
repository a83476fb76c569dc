"""Laws of the data: every format becomes prompt and labelled answer, padding adds nothing, and pairs use every retain
row. Each law has a negative control."""

from __future__ import annotations

from collections import Counter
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.texts import ANSWER, CHAT, QUESTION, WORDS, read, tokenizer
from helpers.tiny import image_rows, text_class_rows, text_rows, tiny_llama, tiny_vit
from hf_unlearn.data.batches import PaddingCollator, default_collator
from hf_unlearn.data.checks import require_disjoint
from hf_unlearn.data.encoding import encode_dataset
from hf_unlearn.data.pairs import PairedCollator, PairedDataset
from hf_unlearn.errors import DataError

# writes the prompt differently before an answer, as templates with hidden reasoning do
REWRITING = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <end> {% endfor %}{% if add_generation_prompt %}<assistant> . {% endif %}"  # noqa: E501


def encode(row: dict[str, Any], **options: Any) -> tuple[str, str]:
    given_tokenizer = options.pop("with_tokenizer", None) or tokenizer()
    return read(encode_dataset([row], given_tokenizer, **options)[0])


# Formats


def test_messages_predict_the_answer() -> None:  # all answers of longer conversations: test_conversations.py
    assert encode({"messages": CHAT}) == (f"<user> {QUESTION} <end> <assistant>", f"{ANSWER} <end>")


def test_a_single_message_is_predicted_whole() -> None:
    assert encode({"messages": CHAT[1:]}) == ("", f"<assistant> {ANSWER} <end>")


def test_a_template_that_rewrites_the_prompt_still_masks_what_both_renderings_share() -> None:
    prompt, answer = encode({"messages": CHAT}, with_tokenizer=tokenizer(REWRITING))
    assert prompt == f"<user> {QUESTION} <end> <assistant>" and answer == f"{ANSWER} <end>"


@pytest.mark.parametrize("bos", [False, True])
def test_prompt_and_completion_mask_the_prompt(bos: bool) -> None:
    row = {"prompt": QUESTION, "completion": f" {ANSWER}"}
    prompt, answer = encode(row, with_tokenizer=tokenizer(bos=bos))
    assert prompt == ("<s> " if bos else "") + QUESTION and answer == f"{ANSWER} </s>"


def test_conversational_prompt_and_completion_are_the_same_as_messages() -> None:
    assert encode({"prompt": CHAT[:1], "completion": CHAT[1:]}) == encode({"messages": CHAT})
    assert encode({"prompt": QUESTION, "completion": f" {ANSWER}"}) != encode({"messages": CHAT})


def test_question_and_answer_use_the_chat_template_where_there_is_one() -> None:
    row = {"question": QUESTION, "answer": ANSWER}
    assert encode(row) == encode({"messages": CHAT})
    plain = encode(row, with_tokenizer=tokenizer(template=None))
    assert plain == (f"Question: {QUESTION} Answer:", f"{ANSWER} </s>")


def test_text_is_predicted_whole() -> None:
    assert encode({"text": QUESTION}) == ("", f"{QUESTION} </s>")
    assert encode({"text": QUESTION}, with_tokenizer=tokenizer(bos=True)) == ("", f"<s> {QUESTION} </s>")


@pytest.mark.parametrize("row", [{"text": "in Ulm"}, {"prompt": "where ?", "completion": " in Ulm"}])
def test_the_end_token_is_appended_once(row: dict[str, str]) -> None:
    last = "text" if "text" in row else "completion"
    closed = {**row, last: row[last] + " </s>"}
    assert encode(row) == encode(closed)
    assert encode(row)[1].count("</s>") == 1
    endless = tokenizer()
    endless.eos_token = None
    assert "</s>" not in encode(row, with_tokenizer=endless)[1]


@pytest.mark.parametrize("rows", [text_rows(3), image_rows(3), text_class_rows(3)])
def test_model_inputs_pass_through_unchanged(rows: list[dict]) -> None:
    assert encode_dataset(rows, None) is rows


def test_datasets_and_lists_of_rows_are_encoded_alike() -> None:
    rows = [{"question": QUESTION, "answer": a} for a in ("in Ulm", "Bonn .")]
    assert encode_dataset(datasets.Dataset.from_list(rows), tokenizer()) == encode_dataset(rows, tokenizer())


@pytest.mark.parametrize("length", [6, 7, 8])
def test_long_rows_are_cut_at_the_end(length: int) -> None:
    row = {"prompt": QUESTION, "completion": f" {ANSWER}"}  # 5 + 4 tokens
    whole, cut = (encode_dataset([row], tokenizer(), max_length=n)[0] for n in (None, length))
    assert len(whole["input_ids"]) == 9 and len(cut["input_ids"]) == length
    assert all(cut[key] == whole[key][:length] for key in whole)


def test_rows_shorter_than_the_limit_are_not_cut() -> None:
    row = {"prompt": QUESTION, "completion": f" {ANSWER}"}
    assert encode_dataset([row], tokenizer(), max_length=9) == encode_dataset([row], tokenizer())


# Errors


@pytest.mark.parametrize("rows", [[], None])
def test_an_empty_set_is_an_error_that_names_it(rows: Any) -> None:
    with pytest.raises(DataError, match="the forget set is empty"):
        encode_dataset(rows, tokenizer(), what="forget")


def test_unknown_columns_are_an_error_that_lists_them_and_the_formats() -> None:
    with pytest.raises(DataError, match=r"columns \['body', 'title'\].*messages, prompt \+ completion.*input_ids"):
        encode_dataset([{"title": "a", "body": "b"}], tokenizer())
    with pytest.raises(DataError, match="needed is one of"):
        encode_dataset([{"prompt": "a"}], tokenizer())


@pytest.mark.parametrize("processor", [None, object()])
def test_raw_rows_without_a_tokenizer_are_an_error(processor: Any) -> None:
    with pytest.raises(DataError, match=r"the holdout set has raw columns \['text'\]; pass the model's tokenizer"):
        encode_dataset([{"text": "in Ulm"}], processor, what="holdout")


def test_a_row_with_nothing_left_to_predict_is_an_error_that_names_it() -> None:
    rows = [{"prompt": "where ?", "completion": " Ulm"}, {"prompt": QUESTION, "completion": f" {ANSWER}"}]
    with pytest.raises(DataError, match="row 1 of the forget set has no token to predict within 5 tokens"):
        encode_dataset(rows, tokenizer(), what="forget", max_length=5)
    assert len(encode_dataset(rows, tokenizer(), max_length=6)) == 2


def test_a_text_of_one_token_has_nothing_to_predict() -> None:
    for text in ("", "Ulm"):  # of which only the end token could be predicted
        with pytest.raises(DataError, match="row 0 of the given set has no token to predict within its tokens"):
            encode({"text": text})
    assert encode({"text": "in Ulm"}) == ("", "in Ulm </s>")
    assert encode({"text": "Ulm"}, with_tokenizer=tokenizer(bos=True)) == ("", "<s> Ulm </s>")


def test_messages_without_a_chat_template_are_an_error() -> None:
    with pytest.raises(DataError, match="no chat template; use prompt"):
        encode({"messages": CHAT}, with_tokenizer=tokenizer(template=None))


# Collation


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_goes_to_one_side_with_each_columns_own_value(side: str) -> None:
    rows = text_rows(3, lengths=(5, 3, 4))
    batch = PaddingCollator(pad_token_id=7, side=side)(rows)
    for name, value in (("input_ids", 7), ("attention_mask", 0), ("labels", -100)):
        for values, row in zip(batch[name].tolist(), rows, strict=True):
            padding = [value] * (5 - len(row[name]))
            assert values == (row[name] + padding if side == "right" else padding + row[name])
    other = PaddingCollator(pad_token_id=7, side="left" if side == "right" else "right")(rows)
    assert not torch.equal(batch["input_ids"], other["input_ids"])


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_missing_attention_mask_is_filled_in_where_the_tokens_are(side: str) -> None:
    rows = text_rows(3)
    bare = [{key: row[key] for key in ("input_ids", "labels")} for row in rows]
    whole, filled = (PaddingCollator(side=side)(r)["attention_mask"] for r in (rows, bare))
    assert torch.equal(whole, filled) and filled.dtype == torch.long


@pytest.mark.parametrize("name", ["label", "label_ids", "labels"])
def test_label_becomes_labels(name: str) -> None:
    batch = PaddingCollator()([{"pixel_values": torch.zeros(2), name: i} for i in range(3)])
    assert batch["labels"].tolist() == [0, 1, 2] and batch.keys() == {"pixel_values", "labels"}


def test_texts_and_missing_values_are_left_out() -> None:
    batch = PaddingCollator()([row | {"source": "a", "note": None} for row in text_rows(2)])
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}


@pytest.mark.parametrize("form", ["list", "numpy", "tensor"])
def test_rows_collate_alike_in_every_container(form: str) -> None:
    convert: Any = {"list": torch.Tensor.tolist, "numpy": torch.Tensor.numpy, "tensor": torch.Tensor.clone}[form]
    images, texts = image_rows(2), [{k: torch.tensor(v) for k, v in row.items()} for row in text_rows(3)]
    for rows in (images, texts):
        expected = PaddingCollator()(rows)
        batch = PaddingCollator()(
            [{k: convert(v) if torch.is_tensor(v) else v for k, v in row.items()} for row in rows]
        )
        for name, tensor in expected.items():
            assert batch[name].dtype == tensor.dtype and torch.equal(batch[name], tensor)


def test_images_as_nested_lists_go_through_a_model() -> None:
    rows = [row | {"pixel_values": row["pixel_values"].tolist()} for row in image_rows(2)]
    model = tiny_vit()
    torch.testing.assert_close(model(**PaddingCollator()(rows)).loss, model(**PaddingCollator()(image_rows(2))).loss)


def test_padding_on_the_right_does_not_change_what_is_predicted() -> None:
    model, rows = tiny_llama(), text_rows(2, lengths=(7, 4))
    with torch.no_grad():
        together = model(**PaddingCollator()(rows)).logits[1, :4]
        alone = model(**PaddingCollator()(rows[1:])).logits[0]
        unmasked = model(**PaddingCollator(side="left")(rows)).logits[1, :4]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(unmasked, alone, atol=1e-2)


def test_default_collator_pads_with_the_tokenizers_token() -> None:
    assert default_collator(tokenizer()).pad_token_id == WORDS.index("<pad>")
    assert default_collator(None).pad_token_id == 0
    padless = tokenizer()
    padless.pad_token = None
    assert default_collator(padless).pad_token_id == 0


# Pairs


def retain_used(pairs: PairedDataset, epochs: int) -> list[int]:
    used = []
    for epoch in range(epochs):
        pairs.set_epoch(epoch)
        used += [pairs[i]["retain"]["row"] for i in range(len(pairs))]
    return used


def numbered(n: int) -> list[dict[str, int]]:
    return [{"row": i} for i in range(n)]


@given(st.integers(1, 7), st.integers(1, 12), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_every_retain_row_is_used_equally_often_over_the_epochs(n_forget: int, n_retain: int, seed: int) -> None:
    pairs = PairedDataset(numbered(n_forget), numbered(n_retain), seed)
    assert len(pairs) == n_forget and [pairs[i]["forget"]["row"] for i in range(n_forget)] == list(range(n_forget))
    used = Counter(retain_used(pairs, epochs=n_retain))  # n_retain epochs: each row n_forget times
    assert used == dict.fromkeys(range(n_retain), n_forget)


def test_negative_control_without_set_epoch_the_same_few_retain_rows_come_again() -> None:
    pairs = PairedDataset(numbered(3), numbered(9))
    assert len({pairs[i]["retain"]["row"] for _ in range(3) for i in range(3)}) == 3
    assert len(set(retain_used(pairs, 3))) == 9


def test_the_order_of_retain_rows_is_a_function_of_the_seed() -> None:
    orders = [retain_used(PairedDataset(numbered(4), numbered(30), seed), 7) for seed in (3, 3, 4)]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0][:28] != list(range(28))  # it is shuffled


def test_a_resumed_epoch_sees_the_pairs_that_it_would_have_seen() -> None:
    run, resumed = (PairedDataset(numbered(4), numbered(9), 1) for _ in range(2))
    whole = retain_used(run, 3)
    resumed.set_epoch(2)
    assert [resumed[i]["retain"]["row"] for i in range(4)] == whole[8:] != whole[:4]


def test_making_pairs_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    PairedDataset(numbered(2), numbered(5), 3)
    assert torch.equal(torch.rand(3), expected)
    torch.randperm(5)
    assert not torch.equal(torch.rand(3), expected)


def test_forget_rows_alone_come_without_retain_rows() -> None:
    assert PairedDataset(numbered(2))[1] == {"forget": {"row": 1}}


@pytest.mark.parametrize(
    ("forget", "retain", "name"), [([], [1], "forget"), (None, None, "forget"), ([1], [], "retain")]
)
def test_pairs_of_nothing_are_an_error(forget: Any, retain: Any, name: str) -> None:
    with pytest.raises(DataError, match=f"the {name} set is empty"):
        PairedDataset(forget, retain)


def test_pairs_are_collated_part_by_part_and_plain_rows_as_they_are() -> None:
    collator, forget, retain = PaddingCollator(), text_rows(3), text_rows(3, seed=1, lengths=(9, 3))
    batch = PairedCollator(collator)([{"forget": f, "retain": r} for f, r in zip(forget, retain, strict=True)])
    plain = PairedCollator(collator)(forget)
    for tensors, expected in ((batch["forget"], forget), (batch["retain"], retain), (plain, forget)):
        assert all(torch.equal(tensors[name], tensor) for name, tensor in collator(expected).items())
    assert batch.keys() == {"forget", "retain"} and plain.keys() == {"input_ids", "attention_mask", "labels"}
    assert not torch.equal(batch["forget"]["input_ids"], batch["retain"]["input_ids"][:, :7])


# Rows in two sets


@pytest.mark.parametrize("form", [list, np.array, torch.tensor])
def test_a_shared_row_is_an_error_that_names_it_on_both_sides(form: Any) -> None:
    forget, others = text_rows(3), text_rows(5, seed=1)
    shared = forget[2] | {"input_ids": form(forget[2]["input_ids"])}
    require_disjoint(forget, others)
    with pytest.raises(
        DataError, match=r"1 forget rows .* forget row 2 is retain row 4\); remove them from the retain"
    ):
        require_disjoint(forget, [*others[:4], shared])
    with pytest.raises(DataError, match=r"2 forget rows .* forget row 0 is retain row 0"):
        require_disjoint(forget, [forget[0], shared])
