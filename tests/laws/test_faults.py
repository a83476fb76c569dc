"""The 28 kinds of fault of version 0.1, each with a test of its own: a run never says that it is done when it is not,
and never loses work to what could be known before. The docstring of a test names the kind, its number the fault.

Most kinds have a complete law in the tests of their room; here each is shown once or twice, with other rows and models
than where it was found, and with what the fault would do as negative control.
"""

from __future__ import annotations

import datetime
import io
import json
import os
import re
import socket
from collections import deque
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, get_peft_model
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DistilBertConfig,
    DistilBertForMaskedLM,
    GPT2Config,
    GPT2ForSequenceClassification,
    IBertConfig,
    IBertForSequenceClassification,
    MPNetConfig,
    MPNetForSequenceClassification,
    PreTrainedTokenizerFast,
)

from helpers.model_kinds import t5
from helpers.pictures import processor
from helpers.texts import CHAT, tokenizer
from helpers.tiny import CLASSES, collate, image_rows, sharpen, text_rows, tiny_bert, tiny_gpt2, tiny_llama, tiny_vit
from helpers.training import FORGET, HOLDOUT, RETAIN, settings
from hf_unlearn.core.files import check_output
from hf_unlearn.data.batches import PaddingCollator
from hf_unlearn.data.encoding import encode_dataset
from hf_unlearn.deletion.arguments import RunArguments
from hf_unlearn.deletion.rows import RowEncoding, load_splits
from hf_unlearn.errors import CoverageError, DataError, ModelError, OutputError, SettingsError
from hf_unlearn.evaluation.row_scores import score_rows
from hf_unlearn.losses import build_loss
from hf_unlearn.models.forward import label_positions
from hf_unlearn.models.tasks import context_length
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.trainer.trainer import UnlearningTrainer

Row = dict[str, Any]
NOTHING: list[Any] = [None, float("nan"), pandas.NA, pandas.NaT]
"""How tables and data sets write a value that is missing."""
PAIR: Row = {"prompt": "where does Ann live ?", "completion": " in Ulm ."}


def encoded(row: Row, words: Any = None, **options: Any) -> Row:
    return dict(encode_dataset([row], words or tokenizer(None), **options)[0])


def labelled(row: Row, words: Any) -> str:
    return " ".join(words.convert_ids_to_tokens(label for label in row["labels"] if label != -100))


def refused(row: Row, reason: str = "", error: type[Exception] = DataError, **options: Any) -> None:
    """A row that is refused in one line that names it, behind one that is not."""
    good = options.pop("good")
    words = options.pop("words", None) or tokenizer(None)
    assert len(encode_dataset([good, good], words, **options)) == 2
    with pytest.raises(error, match=f"row 1 of the forget set.*{reason}") as raised:
        rows = encode_dataset([good, row], words, what="forget", **options)
        rows[1]  # images are encoded when they are read
    assert "\n" not in str(raised.value)


# Rows


LETTERS = "aefghnorstu"
SPLITS = {
    "Metaspace": (pre_tokenizers.Metaspace(), "▁", []),
    "bytes": (pre_tokenizers.ByteLevel(add_prefix_space=False), "Ġ", []),
    "merges over the border": (
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        "Ġ",
        [("Ġ", "t"), ("n", "Ġt"), ("g", "h")],
    ),
}


def letters(split: str, special: str | None = None, lower: bool = False) -> Any:
    before, space, merges = SPLITS[split]
    names = ["<unk>", "<s>", "</s>", space, *LETTERS, *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, merges, unk_token="<unk>"))
    core.pre_tokenizer = before
    if lower:
        core.normalizer = normalizers.Lowercase()
    if special is not None:
        tokens = [("<s>", 1), ("</s>", 2)]
        core.post_processor = processors.TemplateProcessing(single=special, special_tokens=tokens)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("special", [None, "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("split", SPLITS)
def test_01_27_rows_are_the_tokens_of_the_joined_text(split: str, special: str | None) -> None:
    """Prompt and answer were tokenized apart (01), with an end token between them (27)."""
    words = letters(split, special, lower=True)
    for prompt, answer in (("forgeten", " thaf"), ("forgeten ", "thaf"), ("Ho", "nest"), ("", "these"), ("a gh ", "N")):
        row = encoded({"prompt": prompt, "completion": answer}, words)
        whole = words.encode(prompt + answer)
        assert row["input_ids"] == [*whole, *([2] * (whole[-1] != 2))]
        assert row["input_ids"].count(2) == 1 and row["labels"][-1] == 2
        text = labelled(row, words).replace(" ", "").removesuffix("</s>").replace("Ġ", " ").replace("▁", " ")
        assert text.strip().endswith(answer.strip().lower()) and len(text.strip()) <= len(answer) + 2
    apart = words.encode("forgeten ") + words.encode("thaf")  # negative control
    assert apart != words.encode("forgeten thaf") or (split == "bytes" and special is None)


TOOLS = (
    "{% if tools %}<user> {% for tool in tools %}{{ tool.name }} {% endfor %}<end> {% endif %}"
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% if m.tool_calls %} live{% endif %} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def say(role: str, content: Any, **more: Any) -> Row:
    return {"role": role, "content": content, **more}


@pytest.mark.parametrize("tools", [[{"name": "Rome"}], '[{"name": "Rome"}]'])
def test_02_every_answer_of_a_conversation_is_labelled(tools: Any) -> None:
    """Only the last answer was forgotten, or what the user said last; tools were left out of the conversation."""
    words = tokenizer(TOOLS)
    talk = [*CHAT, say("user", "where"), say("assistant", "", tool_calls=[{"name": "Rome"}]), say("tool", "Bonn")]
    talk += [say("assistant", "Rome"), say("user", "does Ann")]
    row = encoded({"messages": [say("system", "live"), *talk], "tools": tools}, words)
    assert labelled(row, words) == "in Ulm . <end> live <end> Rome <end>"
    assert words.decode(row["input_ids"]).startswith("<user> Rome <end> <system>".replace("<system>", "<unk>"))
    alone = encoded({"messages": talk}, words)
    assert labelled(alone, words) == labelled(row, words) and len(alone["input_ids"]) < len(row["input_ids"])
    refused({"messages": CHAT, "tools": "{"}, "not a list", good={"messages": CHAT, "tools": tools}, words=words)


def one_token(kind: str) -> tuple[Any, list[Row]]:
    torch.manual_seed(0)
    if kind == "seq2seq":
        return sharpen(t5(), 2.0), [{"input_ids": [5, 6, 7], "labels": [k]} for k in (11, 12)]
    return tiny_llama(), [{"input_ids": [5, k], "labels": [-100, k]} for k in (11, 12)]


@pytest.mark.parametrize("kind", ["seq2seq", "causal"])
@pytest.mark.parametrize("end", [[], [3]])
def test_04_the_default_loss_pushes_answers_of_one_token(kind: str, end: list[int], tmp_path: Path) -> None:
    """The first label of each row was skipped: an answer of one token was not pushed, or only its end token."""
    model, answers = one_token(kind)
    longer = ("labels",) if kind == "seq2seq" else ("input_ids", "labels")
    rows = [{name: row[name] + end * (name in longer) for name in row} for row in answers]
    retain = [{"input_ids": [8, 9, 10, 4], "labels": [9, 10, 4, 4]}]
    before = score_rows(model, answers, PaddingCollator()).loss  # of the answers alone
    args = settings(tmp_path, max_steps=3, learning_rate=3e-3, constraint="none")
    UnlearningTrainer(model, args, rows, retain).train()
    assert score_rows(model, answers, PaddingCollator()).loss.mean() > before.mean()
    skipped = label_positions(t5(), torch.tensor([[7, 8, 9]]), skip_first=True)  # what the loss does with longer ones
    assert skipped.tolist() == [[False, True, True]]


def test_04_a_text_of_one_token_is_refused() -> None:
    """Nothing precedes a text's only token, so only its end token would be forgotten."""
    good = {"text": "Ann live"}
    for text in ("", " ", "Ulm"):
        refused({"text": text}, "has no token to predict", good=good)
    assert labelled(encoded({"text": "Ulm"}, tokenizer(None, bos=True)), tokenizer(None)) == "<s> Ulm </s>"


@pytest.mark.parametrize("value", [*NOTHING, "", 4, True, ["a"], "half \ud800"], ids=ascii)
def test_07_28_a_cell_that_is_no_text_names_its_row(value: Any) -> None:
    """A missing answer was forgotten as the text "None" (28) or was a traceback (07)."""
    shown = ascii(value)
    pairs: dict[Any, Row] = {
        "language-model": {"question": "where", "answer": "Ulm", "gt": "x"},
        "seq2seq": {"document": "Ann live", "summary": "in Ulm"},
    }
    for task, good in pairs.items():
        for name in list(good)[:2]:
            if shown != "''" or name != "question":  # an empty prompt is one
                refused({**good, name: value}, name, good=good, task=task)
                refused({k: v for k, v in good.items() if k != name}, name, good=good, task=task)
    sentence: Row = {"sentence": "Ann", "label": 1}
    refused({**sentence, "sentence": value}, "sentence", good=sentence, task="text-classification")
    tagged = {"words": ["Ann", "Ulm"], "tags": [1, 2]}
    if shown not in ("''", "['a']"):
        refused({**tagged, "words": ["Ann", value]}, "word 1", good=tagged, task="token-classification")
    other = {"question": "where", "answer": "in Ulm", "perturbed_answer": ["in Bonn"]}
    if shown != "['a']":
        refused({**other, "perturbed_answer": ["in Rome", value]}, "answer", good=other)
        refused({**other, "perturbed_answer": value}, "perturbed_answer", good=other)
    if shown not in ("None", "''"):
        refused({**PAIR, "alternate": value}, "completion", good=PAIR)


def test_08_a_conversation_that_a_template_rejects_names_its_row() -> None:
    """Errors of a chat template were tracebacks without the row."""
    strict = tokenizer(
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}<{{ m.role }}> {{ m.content.strip() }} {% endfor %}"
    )
    good = {"messages": CHAT}
    for messages in (
        [CHAT[0], *CHAT],
        [CHAT[1]],
        [say("user", {"text": "in"}), CHAT[1]],
        [CHAT[0], say("assistant", 3)],
    ):
        refused({"messages": messages}, good=good, words=strict)
    for value in (*NOTHING, {}, [[]], [None]):
        refused({"messages": value}, good=good, words=strict)
    pair = {"prompt": CHAT[:1], "completion": CHAT[1:]}
    refused({"prompt": [CHAT[0], CHAT[0]], "completion": CHAT[1:]}, "roles must alternate", good=pair, words=strict)


def jpeg(image: Any, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


COLOURS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
COLOUR = Image.fromarray(COLOURS)
PALETTE = COLOUR.quantize(16)


@pytest.mark.parametrize("channels", [1, 3])
def test_14_15_images_in_every_form_are_the_same_picture_or_refused(channels: int) -> None:
    """Tensors, bytes and None were tracebacks (14), 16-bit images white (15), palettes read as grey values."""
    picture: dict[str, Any] = {"task": "image-classification", "words": processor(channels=channels)}

    def pixels(image: Any) -> torch.Tensor:
        (row,) = encode_dataset([{"image": image, "label": 1}], picture["words"], task="image-classification")
        return row["pixel_values"]

    want = pixels(COLOUR.convert("L" if channels == 1 else "RGB"))
    assert want.shape == (channels, 8, 8)
    tensor = torch.as_tensor(COLOURS).permute(2, 0, 1)
    for image in (COLOUR, COLOURS, tensor, jpeg(COLOUR), {"bytes": jpeg(COLOUR), "path": None}, COLOUR.convert("RGBA")):
        assert torch.equal(pixels(image), want)
    plain = pixels(PALETTE.convert("RGB"))
    for image in (PALETTE, jpeg(PALETTE, "GIF"), PALETTE.convert("PA"), PALETTE.convert("CMYK"), jpeg(PALETTE)):
        torch.testing.assert_close(pixels(image), plain, atol=0.02, rtol=0)
    assert not torch.allclose(pixels(Image.fromarray(np.asarray(PALETTE))), plain, atol=0.1)  # the palette's numbers
    good = {"image": COLOUR, "label": 1}
    deep = Image.fromarray(COLOURS[..., 0].astype(np.uint16) * 200)
    wrong = [
        deep,
        jpeg(deep),
        deep.convert("F"),
        tensor.bfloat16() / 255,
        COLOURS / 255,
        COLOURS[None],
        COLOURS[..., :2],
    ]
    for image in [*wrong, np.zeros((8, 8, 5), np.uint8), b"", {}, "missing.png", *NOTHING]:
        refused({"image": image, "label": 1}, "image", good=good, **picture)


@pytest.mark.parametrize("label", [-1, CLASSES, "1", 1.5, float("inf"), *NOTHING, [1], ""], ids=ascii)
def test_05_labels_that_are_no_class_name_their_row(label: Any, tmp_path: Path) -> None:
    """Labels beyond the classes were an index error after the work; of encoded rows they were found in the run."""
    text, picture = {"text": "Ann", "label": 1}, {"image": COLOUR, "label": 1}
    refused({**text, "label": label}, "label", good=text, model=tiny_bert())
    refused({**picture, "label": label}, "label", good=picture, model=tiny_vit(), words=processor())
    tagged = {"tokens": ["Ann", "Ulm"], "ner_tags": [1, -100]}
    if not isinstance(label, int):  # without a model any class may be
        refused({**tagged, "ner_tags": [1, label]}, "label", good=tagged, task="token-classification")
    rows = [{"input_ids": [5, k], "labels": k % 2} for k in range(8)]
    bad = [*rows[:3], {**rows[3], "labels": label}]
    if label is not None:  # rows of statistics need no labels
        for forget, retain, name in ((bad, rows[4:], "forget"), (rows[4:], bad, "retain")):
            with pytest.raises(DataError, match=f"row 3 of the {name} set has"):
                UnlearningTrainer(tiny_bert(), settings(tmp_path), forget, retain)
    UnlearningTrainer(tiny_bert(), settings(tmp_path), rows[:4], rows[4:])


@pytest.mark.parametrize("names", [("question", "sentence"), ("query", "passage"), ("sentence_A", "sentence_B")])
def test_16_no_part_of_a_pair_is_dropped(names: tuple[str, str]) -> None:
    """The second text of a pair was not read, or one of None was left out."""
    good = {names[0]: "Ann", names[1]: "Ulm", "label": 1}
    assert tokenizer().decode(encoded(good, model=tiny_bert())["input_ids"]) == "Ann Ulm"
    for value in (*NOTHING, 3):
        refused({**good, names[1]: value}, names[1], good=good, model=tiny_bert())
    with pytest.raises(DataError, match="would not be read"):
        encode_dataset([{**good, "context": "Rome"}], tokenizer(), model=tiny_bert())
    with pytest.raises(DataError, match="context, which would not be read"):
        encode_dataset([{"question": "where", "answer": "Ulm", "context": "in"}], tokenizer())


def test_17_copies_of_forget_rows_are_no_retain_rows(tmp_path: Path) -> None:
    """A forget row that the train split has twice hid another that it lacks, and made a negative count."""
    tables = {
        "train": ["in Ulm", "in Bonn", "in Ulm", "Ann live", "in Ulm"],
        "twice": ["in Ulm"],
        "lost": ["in Ulm", "Rome ?"],
    }
    for name, texts in tables.items():
        lines = (json.dumps({"text": text}) for text in texts)
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))

    def splits(forget: str) -> Any:
        args = RunArguments(dataset_name=str(tmp_path), train="train", forget=forget)
        words: Any = tokenizer(None)
        return load_splits(args, words, RowEncoding(task="language-model", max_length=None))

    found = splits("twice")
    assert (len(found.forget), len(found.copies), len(found.evaluation["retain"])) == (1, 2, 2)
    with pytest.raises(DataError, match=r"1 of .*2 forget rows|1 forget row") as raised:
        splits("lost")
    assert not re.search(r"(?<!\w)-\d", str(raised.value))


def test_17_padding_hides_no_forget_row_among_the_retain_rows(tmp_path: Path) -> None:
    """A row that was padded beforehand is the same row."""
    forget = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]
    padded = {"input_ids": [5, 6, 7, 2], "attention_mask": [1, 1, 1, 0], "labels": [-100, 6, 7, -100]}
    with pytest.raises(DataError, match="1 forget rows are also in the retain set"):
        UnlearningTrainer(tiny_llama(), settings(tmp_path), forget, [*RETAIN, padded])
    longer = {**padded, "attention_mask": [1, 1, 1, 1]}
    UnlearningTrainer(tiny_llama(), settings(tmp_path), forget, [*RETAIN, longer])


@pytest.mark.parametrize("task", ["language-model", "seq2seq", "text-classification", "token-classification"])
def test_18_cut_rows_are_told(task: Any) -> None:
    """Rows were cut at max_length without a word."""
    long = " ".join(["Ann", "live"] * 10)
    row: Row = {"text": long, "label": 1, "summary": "Ulm", "tokens": long.split(), "ner_tags": [1] * 20}
    if task == "language-model":
        row = {"prompt": "where", "completion": " " + long, "alternate": long}
    with pytest.warns(UserWarning, match="1 of 1 rows of the given set are cut at 9 tokens"):
        assert len(encoded(row, task=task, max_length=9)["input_ids"]) == 9


def test_19_containers_that_are_no_rows_say_what_to_pass(tmp_path: Path) -> None:
    """Splits, tables and iterators were a KeyError or lost their first row."""
    rows = [PAIR, {**PAIR, "completion": " in Rome"}]
    once = (row for row in rows)
    table = pandas.DataFrame(rows)
    for given in (
        once,
        zip(rows, rows, strict=True),
        table,
        table["prompt"],
        {"train": rows},
        rows[0],
        set("ab"),
        3,
        "name",
        [1, 2],
        b"",
    ):
        for streams in (False, True):
            with pytest.raises(DataError, match="the given set"):
                encode_dataset(given, tokenizer(), streams=streams)  # type: ignore[call-overload]
        with pytest.raises(DataError, match="the statistics set"):
            collect_statistics(tiny_llama(), given, processing_class=tokenizer(), progress=False)  # type: ignore[arg-type]
    assert len(list(once)) == 2  # which nothing has read
    for row in (None, "in Ulm", 3, ["in"]):
        refused(row, "not a mapping", good=PAIR)  # type: ignore[arg-type]
        with pytest.raises(DataError, match="row 4 of the forget set"):
            UnlearningTrainer(tiny_llama(), settings(tmp_path), [*FORGET, row], RETAIN)  # type: ignore[list-item]
    for good in (tuple(rows), deque(rows), datasets.Dataset.from_list(rows), np.array(rows, dtype=object)):
        assert len(encode_dataset(good, tokenizer())) == 2  # type: ignore[arg-type]


def test_20_columns_that_no_model_takes_are_left_out() -> None:
    """Columns of texts, dates and missing values reached the model."""
    for values in (
        [datetime.timedelta(1)] * 2,
        [[None, 1], [2]],
        [1, None],
        ["a", 1],
        [{1}, {2}],
        [[["x"]]] * 2,
        [1j, 2j],
    ):
        rows = [{**row, "note": value} for row, value in zip(text_rows(2), values, strict=True)]
        assert "note" not in PaddingCollator()(rows)
    broken = [{**text_rows(1)[0], "attention_mask": [1, 1]}]
    for use in (lambda: collect_statistics(tiny_llama(), broken, progress=False),):
        with pytest.raises(DataError, match="row 0 of the statistics set has 7 input_ids and 2 attention_mask"):
            use()


def test_23_a_masked_language_model_continues_no_text() -> None:
    """Its raw rows were labelled with what stands in their input."""
    size: Row = {"vocab_size": 29, "dim": 16, "hidden_dim": 16, "n_heads": 2, "n_layers": 1}
    masked = DistilBertForMaskedLM(DistilBertConfig(**size))
    for row in (PAIR, {"text": "in Ulm"}, {"input_ids": [5, 6], "labels": [5, 6]}):
        with pytest.raises(DataError, match="would only copy its labels"):
            encoded(row, model=masked)
        encoded(row, model=tiny_gpt2())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["XLM", "Flaubert", "MegatronBert"])
def test_23_nor_does_one_that_does_not_say_so(kind: str, causal: bool) -> None:
    """Attention modules without a flag, which is found by a forward pass; the control is the same model, causal."""
    sizes: Row = {"vocab_size": 29, "emb_dim": 16, "n_layers": 1, "n_heads": 2, "causal": causal}
    if kind == "MegatronBert":
        sizes = {"vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        sizes |= {"intermediate_size": 32, "is_decoder": causal}
    head = "ForCausalLM" if kind == "MegatronBert" else "WithLMHeadModel"
    config = getattr(transformers, f"{kind}Config")(**sizes)
    model = getattr(transformers, f"{kind}{head}")(config)
    with nullcontext() if causal else pytest.raises(DataError, match="would only copy its labels"):
        encoded(PAIR, model=model)


# Padding, ids and positions


def test_05_scores_do_not_depend_on_what_a_batch_is_padded_with() -> None:
    """A decoder's classifier without a padding id failed, with another one than the tokenizer's it read padding."""
    rows = [{"input_ids": [*range(4, 4 + n)], "labels": n % 3} for n in (8, 2, 5)]
    for pad in (None, -1, 28, 7):
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=29, n_embd=16, n_layer=1, n_head=2, num_labels=3, pad_token_id=pad)
        model = sharpen(GPT2ForSequenceClassification(config))
        alone = score_rows(model, rows, PaddingCollator(0), 1).probability
        for pad_with in (0, 7, 28):
            together = score_rows(model, rows, PaddingCollator(pad_with), 3).probability
            np.testing.assert_allclose(together, alone, atol=1e-5)


def test_09_ids_without_an_embedding_name_their_row(tmp_path: Path) -> None:
    """Ids beyond the embedding were an index error."""
    for token in (-2, 29, 10**6):
        row = {"input_ids": [5, token, 7], "labels": [5, 6, 7]}
        for forget, retain in (([*FORGET, row], RETAIN), (FORGET, [*RETAIN, RETAIN[0], RETAIN[0], row])):
            with pytest.raises(DataError, match=f"row 4 of .* token id {token}; .*resize_token_embeddings"):
                UnlearningTrainer(tiny_llama(), settings(tmp_path), forget, retain)
        padding = {"input_ids": [5, 7, token], "attention_mask": [1, 1, 0], "labels": [5, 7, token]}
        UnlearningTrainer(tiny_llama(), settings(tmp_path), [*FORGET, padding], RETAIN)
    for tokens in ([], [[5, 6]], [5.5, 6.0], ["a"], [None]):
        with pytest.raises(DataError, match="row 0 of the statistics set has"):
            collect_statistics(tiny_llama(), [{"input_ids": tokens, "labels": tokens}], progress=False)


@pytest.mark.parametrize("loss", ["ce_u", "npo", "grad_ascent"])
def test_10_labels_on_padding_do_not_count(loss: str) -> None:
    """Labels where the attention mask is 0 were scored and pushed."""
    rows = text_rows(2, lengths=(5, 7))
    padded = [
        {
            "input_ids": [9] * k + row["input_ids"],
            "attention_mask": [0] * k + [1] * len(row["input_ids"]),
            "labels": [9] * k + row["labels"],
        }
        for k, row in ((6, rows[0]), (4, rows[1]))
    ]
    model = tiny_llama()
    counts = [build_loss(loss).counts(model, {"forget": collate(part)}) for part in (rows, padded)]
    assert counts[0] == counts[1]
    plain, filled = (score_rows(model, part, PaddingCollator()) for part in (rows, padded))
    np.testing.assert_allclose(filled.loss, plain.loss, rtol=1e-4)
    unmasked = [{**row, "attention_mask": [1] * len(row["labels"])} for row in padded]  # negative control
    assert not np.allclose(score_rows(model, unmasked, PaddingCollator()).loss, plain.loss, rtol=1e-2)


def test_13_positions_end_where_the_model_has_none(tmp_path: Path) -> None:
    """The last positions of RoBERTa's kin were an index error, as were those of a decoder's answer."""
    size: Row = {"vocab_size": 29, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    size |= {"num_attention_heads": 2, "max_position_embeddings": 20, "pad_token_id": 1}
    for model in (
        MPNetForSequenceClassification(MPNetConfig(**size)),
        IBertForSequenceClassification(IBertConfig(**size)),
    ):
        assert context_length(model) == 18
    model = MPNetForSequenceClassification(MPNetConfig(**size))
    assert collect_statistics(model, [{"input_ids": [5] * 18, "labels": 0}], progress=False).rows == 1
    for length in (19, 20, 21):
        with pytest.raises(DataError, match=f"{length} tokens, the model's context is 18"):
            collect_statistics(model, [{"input_ids": [5] * length, "labels": 0}], progress=False)
    bart: Row = {"vocab_size": 29, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16}
    bart |= {"decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    writer = BartForConditionalGeneration(BartConfig(**bart, max_position_embeddings=12))
    fits, longer = ([{"input_ids": [5, 6], "labels": [7] * length}] for length in (12, 13))
    assert score_rows(writer, fits, PaddingCollator()).loss.shape == (1,)
    for use in (lambda: score_rows(writer, longer, PaddingCollator()), lambda: collect_statistics(writer, longer)):
        with pytest.raises(DataError, match=r"13 .*the model's context is 12"):
            use()


# Models


ADAPTERS = {
    "LoRA": LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2),
    "IA3": IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]),
    "biases": LoraConfig(target_modules=["q_proj"], r=2, bias="all"),
    "tokens": LoraConfig(target_modules=["q_proj"], r=2, trainable_token_indices=[1, 2]),
}


def adapted(kind: str) -> Any:
    model = get_peft_model(tiny_llama(), ADAPTERS[kind])
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("constraint", ["energy", "none"])
def test_03_frozen_weights_are_not_left_out_in_silence(constraint: str, tmp_path: Path) -> None:
    """After merge_and_unload nothing trained, or the head alone."""
    args = settings(tmp_path, constraint=constraint)
    for model in (adapted("LoRA").merge_and_unload(), adapted("IA3").merge_and_unload(), adapted("LoRA").unload()):
        with pytest.raises(CoverageError, match=r"all 14 .* are frozen.*requires_grad_\(True\)"):
            UnlearningTrainer(model, args, FORGET, RETAIN)
        UnlearningTrainer(model.requires_grad_(True), args, FORGET, RETAIN)
    vit = tiny_vit().requires_grad_(False)
    vit.classifier.requires_grad_(True)
    with pytest.raises(CoverageError, match="12 of 13"):
        UnlearningTrainer(vit, args, image_rows(2), image_rows(2, 1))


def test_24_weights_that_are_elsewhere_are_refused() -> None:
    """Offloaded weights were an error of the meta device in the first pass."""
    bert = tiny_bert()
    bert.bert.encoder.to("meta")
    with pytest.raises(ModelError, match="weights of BertForSequenceClassification are not in memory"):
        collect_statistics(bert, [{"input_ids": [5, 6], "labels": 1}], progress=False)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_25_statistics_through_an_adapter_are_not_the_base_models(kind: str) -> None:
    """They had the fingerprint of the base weights."""
    model = adapted(kind)
    with pytest.raises(ModelError, match="has been trained"):
        collect_statistics(model, RETAIN, progress=False)
    if kind != "LoRA":  # others are refused for safety when they are disabled, by the fingerprint of the weights
        return
    with model.disable_adapter():
        collect_statistics(model, RETAIN, progress=False).check_model(tiny_llama())


@pytest.mark.parametrize("given", [{"top_p": 0.9}, {"typical_p": 0.5}, {"num_beams": 1, "early_stopping": True}])
def test_06_a_model_that_cannot_be_saved_is_refused_before_the_run(given: Row, tmp_path: Path) -> None:
    """A generation configuration that is read and not written lost a finished run."""
    model = tiny_llama()
    for name, value in given.items():
        setattr(model.generation_config, name, value)
    try:
        model.save_pretrained(tmp_path / "saved")
    except ValueError:
        with pytest.raises(ModelError, match=r"generation_config .* cannot be saved .*correct it before the run"):
            UnlearningTrainer(model, settings(tmp_path), FORGET, RETAIN)
    else:
        UnlearningTrainer(model, settings(tmp_path), FORGET, RETAIN)


# Runs


@pytest.mark.parametrize("returned", [{"mine": 1.0}, {}, {"probability": 0.0, "loss": 99.0}], ids=str)
def test_11_own_metrics_do_not_change_when_a_run_stops(returned: Row, tmp_path: Path) -> None:
    """Evaluations without the forget metric were a KeyError, or never stopped."""
    reasons = []
    for own in ({}, {"compute_metrics": lambda prediction: dict(returned)}):
        args = settings(
            tmp_path, max_steps=8, learning_rate=2e-2, eval_strategy="steps", eval_steps=2, constraint="none"
        )
        trainer = UnlearningTrainer(tiny_llama(), args, FORGET, RETAIN, holdout_dataset=HOLDOUT, **own)  # type: ignore[arg-type]
        trainer.train()
        reasons.append((trainer.stop_reason, trainer.state.global_step))
    assert reasons[0] == reasons[1]


@pytest.mark.parametrize("returned", [None, 0.5, [1.0]])
def test_11_own_metrics_that_are_none_say_so(returned: Any, tmp_path: Path) -> None:
    """What a function for metrics returns is a mapping, or an error that says what to return."""
    args = settings(tmp_path, max_steps=1)
    trainer = UnlearningTrainer(
        tiny_llama(), args, FORGET, RETAIN, holdout_dataset=HOLDOUT, compute_metrics=lambda prediction: returned
    )
    with pytest.raises(SettingsError, match=r"compute_metrics returned .*; return a dict of numbers by name"):
        trainer.train()


@pytest.mark.parametrize(
    ("first", "more", "steps"),
    [({"max_steps": 2}, {"max_steps": 3}, 3), ({"max_steps": 2}, {"num_train_epochs": 2}, 4)],
)
def test_12_a_run_goes_on_when_it_is_resumed_with_more(first: Row, more: Row, steps: int, tmp_path: Path) -> None:
    """A run that had made all its steps made none when it was resumed with more of them."""
    for change, expected in ((first, 2), (first, 2), ({"max_steps": -1, **more}, steps)):
        args = settings(tmp_path, save_strategy="steps", save_steps=1, **change)
        trainer = UnlearningTrainer(tiny_llama(), args, FORGET, RETAIN)
        trainer.train(resume_from_checkpoint=(tmp_path / "checkpoint-2").exists())
        assert trainer.state.global_step == expected


@pytest.mark.parametrize(
    "setting",
    [
        {"dataloader_drop_last": True},
        {"label_smoothing_factor": 0.2},
        {"batch_eval_metrics": True},
        {"load_best_model_at_end": True, "save_strategy": "epoch"},
        {"logging_steps": 0},
        {"optim": "adam_of_none"},
        {"warmup_steps": -1},
        {"max_length": 0},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "metric_for_best_model": "eval_loss"},
    ],
    ids=str,
)
def test_21_settings_that_cannot_be_kept_are_refused(setting: Row, tmp_path: Path) -> None:
    """Settings of Trainer ended in tracebacks after the work."""
    with pytest.raises(
        SettingsError, match="metric" if len(setting) > 1 else "|".join((*setting, *map(str, setting.values())))
    ) as raised:
        UnlearningTrainer(tiny_llama(), settings(tmp_path, **setting), FORGET, RETAIN, holdout_dataset=HOLDOUT)
    assert "\n" not in str(raised.value)
    UnlearningTrainer(tiny_llama(), settings(tmp_path), FORGET, RETAIN, holdout_dataset=HOLDOUT)


def test_22_what_is_no_folder_is_refused_and_stays(tmp_path: Path) -> None:
    """A device as output folder was swapped for a folder; a pipe and a socket stand for it."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "missing")
    (tmp_path / "chain").symlink_to(tmp_path / "pipe")
    server, place = socket.socket(socket.AF_UNIX), os.getcwd()
    os.chdir(tmp_path)  # the name of a socket is short
    try:
        server.bind("socket")
    finally:
        os.chdir(place)
    before = {path.name: os.lstat(path).st_mode for path in tmp_path.iterdir()}
    for name in before:
        for overwrite in (False, True):
            with pytest.raises(OutputError, match=name):
                check_output(tmp_path / name, overwrite)
    server.close()
    assert {path.name: os.lstat(path).st_mode for path in tmp_path.iterdir()} == before
    check_output(tmp_path / "new", False)


def test_26_a_trainer_evaluates_the_rows_that_it_takes(tmp_path: Path) -> None:
    """Raw rows were a traceback in evaluate and predict."""
    raw = [{"question": "where", "answer": word} for word in ("Ulm", "Rome", "nowhere")]
    trainer = UnlearningTrainer(tiny_llama(), settings(tmp_path), [PAIR], raw, processing_class=tokenizer())
    rows = encode_dataset(raw, tokenizer())
    assert trainer.evaluate(datasets.Dataset.from_list(raw))["eval_loss"] == trainer.evaluate(rows)["eval_loss"]
    assert trainer.predict(raw).metrics["test_loss"] == trainer.predict(rows).metrics["test_loss"]
    for bad in ([{"nothing": 1}], pandas.DataFrame(raw), []):
        for use in (trainer.evaluate, trainer.predict):
            with pytest.raises(DataError, match=r"the (evaluation|test) set"):
                use(bad)


def test_26_unknown_words_alone_make_no_row_another(tmp_path: Path) -> None:
    """Two texts of the same unknown words are a warning, the same text in both sets is an error."""
    forget, retain = ([{**PAIR, "completion": f" {word} ."}] for word in ("Kiel", "Trier"))
    with pytest.warns(UserWarning, match="1 forget rows have the tokens of retain rows with another text"):
        UnlearningTrainer(tiny_llama(), settings(tmp_path), forget, retain, processing_class=tokenizer())
    with pytest.raises(DataError, match="1 forget rows are also in the retain set"):
        UnlearningTrainer(tiny_llama(), settings(tmp_path), forget, [*retain, *forget], processing_class=tokenizer())
