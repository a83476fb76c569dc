"""Laws of what users bring: containers that are no rows, images as data sets hold them, columns that no model takes,
and models that cannot continue a text. Each has a negative control."""

from __future__ import annotations

import datetime
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertForMaskedLM, BertLMHeadModel

from helpers.pictures import processor
from helpers.texts import CHAT, QUESTION, tokenizer
from helpers.tiny import text_rows, tiny_llama, tiny_vit
from hf_unlearn import UnlearningConfig, UnlearningTrainer
from hf_unlearn.data.batches import PaddingCollator
from hf_unlearn.data.encoding import encode_dataset
from hf_unlearn.errors import DataError, UnlearningError
from hf_unlearn.evaluation.attacks.auditing import audit
from hf_unlearn.evaluation.evaluate import evaluate_unlearning
from hf_unlearn.evaluation.row_scores import score_rows
from hf_unlearn.models.tasks import Task
from hf_unlearn.statistics.collect import collect_statistics

ROWS = [{"text": QUESTION}, {"text": "in Ulm"}]


class Stream(torch.utils.data.IterableDataset):
    """A stream that knows its length."""

    def __len__(self) -> int:
        return len(ROWS)

    def __iter__(self) -> Any:
        return iter(ROWS)


class OneBad(torch.utils.data.Dataset):
    """A data set of which a row is not a mapping."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Any:
        return [ROWS[0], "in Ulm"][index]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (datasets.DatasetDict(train=datasets.Dataset.from_list(ROWS)), r"is a DatasetDict with keys \['train'\]"),
        ({"text": ["in Ulm"]}, "datasets.Dataset.from_dict"),
        (ROWS[0], r"\[row\] for one row"),
        (pandas.DataFrame(ROWS), "is a DataFrame; pass its rows"),
        ("locuslab/TOFU", "load it first"),
        ({"in", "Ulm"}, "is a set, whose rows have no numbers"),
        (["in Ulm"], "row 0 of the forget set is a str"),
        ([(QUESTION, 1)], "row 0 of the forget set is a tuple"),
        (torch.ones(2, 3), "row 0 of the forget set is a Tensor"),
        (pandas.Series(ROWS, index=[7, 8]), "is a Series; pass its rows as a list"),
        (datasets.Dataset.from_list(ROWS).data.table, r"is a Table; pass its rows as a list, its to_pylist"),
        (
            datasets.Dataset.from_list(ROWS).with_format("pandas"),
            r"formatted as tables: pass dataset.with_format\(None",
        ),
        (datasets.Dataset.from_list(ROWS).with_format("arrow"), r"formatted as tables: pass dataset.with_format\(None"),
        (iter(ROWS), "is a list_iterator, which can be read only once; pass list"),
        ((row for row in ROWS), "is a generator, which can be read only once; pass list"),
        (map(dict, ROWS), "is a map, which can be read only once"),
        (lambda: ROWS, "is <function .*, not rows; pass a list of rows"),
        (datasets.Dataset, "is <class .*, not rows; pass a list of rows"),
        (5, "is 5, not rows; pass a list of rows"),
        (datasets.Dataset.from_list(ROWS).to_iterable_dataset(), "is a stream, which only collect_statistics reads"),
        (Stream(), "is a stream, which only collect_statistics reads"),
        (torch.utils.data.DataLoader(ROWS), "is a DataLoader, whose rows have no numbers"),  # type: ignore[arg-type]
        ([None], "row 0 of the forget set is a NoneType"),
        ([ROWS[0], None], "row 1 of the forget set is a NoneType"),
        (OneBad(), "row 1 of the forget set is a str"),
        ([{"input_ids": [1], "labels": [1]}, "in Ulm"], "row 1 of the forget set is a str"),
        ([], "is empty"),
        (None, "is empty"),
    ],
)
def test_a_container_that_is_no_rows_is_an_error_that_says_what_to_pass(given: Any, reason: str) -> None:
    with pytest.raises(DataError, match=f"the forget set.*{reason}|{reason}"):
        encode_dataset(given, tokenizer(), what="forget")
    for rows in (ROWS, tuple(ROWS), datasets.Dataset.from_list(ROWS)):
        assert len(encode_dataset(rows, tokenizer(), what="forget")) == 2


ENTRIES: dict[str, Callable[[Any, Path], object]] = {
    "forget set": lambda rows, folder: trainer(folder, forget_dataset=rows),
    "retain set": lambda rows, folder: trainer(folder, retain_dataset=rows),
    "holdout set": lambda rows, folder: trainer(folder, holdout_dataset=rows),
    "evaluation set": lambda rows, folder: trainer(folder).evaluate(rows),
    "test set": lambda rows, folder: trainer(folder).predict(rows),
    "statistics set": lambda rows, folder: collect_statistics(tiny_llama(), rows, progress=False),
    "scored set": lambda rows, folder: score_rows(tiny_llama(), rows, PaddingCollator()),
    "known set": lambda rows, folder: evaluate_unlearning(tiny_llama(), {"forget": text_rows(1), "known": rows}),
    "other set": lambda rows, folder: audit(tiny_llama(), {"forget": text_rows(1), "other": rows}),
}


def trainer(folder: Path, **sets: Any) -> UnlearningTrainer:
    args = UnlearningConfig(str(folder), max_steps=1, use_cpu=True, disable_tqdm=True)
    own = {"forget_dataset": text_rows(2), "retain_dataset": text_rows(2, seed=5)}
    return UnlearningTrainer(tiny_llama(), args, **(own | sets))


@pytest.mark.parametrize("entry", list(ENTRIES))
def test_every_entry_reads_rows_or_says_what_to_pass(entry: str, tmp_path: Path) -> None:
    rows = text_rows(3, seed=8)
    table = pandas.DataFrame(rows)
    wrong = [table, table["labels"], (row for row in rows), lambda: rows, 5, [None], [*rows, "text"], "name", {"a"}]
    for given in wrong:
        with pytest.raises(UnlearningError, match=r"pass|give|load it first|there is no evaluation split") as error:
            ENTRIES[entry](given, tmp_path)
        assert "\n" not in str(error.value)
        assert f"the {entry}" in str(error.value) or given == "name"
    data = datasets.Dataset.from_list(rows)
    for given in (rows, data, data.with_format("torch"), data.with_format("numpy"), torch.utils.data.Subset(data, [0])):
        ENTRIES[entry](given, tmp_path)


def test_splits_must_have_names() -> None:
    for read in (evaluate_unlearning, audit):
        for given, kind in ((text_rows(2), "list"), (datasets.Dataset.from_list(text_rows(2)), "Dataset")):
            with pytest.raises(DataError, match=f"the splits are a {kind}; name them"):
                read(tiny_llama(), given)  # type: ignore[operator]


@pytest.mark.parametrize("form", ["torch", "numpy", None])
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("language-model", {"text": QUESTION}),
        ("language-model", {"messages": CHAT, "alternate": "in Rome"}),
        ("language-model", {"prompt": CHAT[:1], "completion": CHAT[1:]}),
        ("language-model", {"question": QUESTION, "answer": "in Ulm", "perturbed_answer": ["in Bonn", "in Rome"]}),
        ("text-classification", {"text": QUESTION, "label": 1, "idx": 3}),
        ("token-classification", {"tokens": ["in", "Ulm"], "ner_tags": [0, 1]}),
        ("seq2seq", {"source": QUESTION, "target": "in Ulm"}),
    ],
)
def test_formatted_data_sets_are_read_as_lists_are(task: Task, row: Any, streams: bool, form: str | None) -> None:
    data: Any = datasets.Dataset.from_list([row, row])
    data = (data.to_iterable_dataset() if streams else data).with_format(form)
    assert list(encode_dataset(data, tokenizer(), task=task, streams=streams)) == [
        dict(encoded) for encoded in encode_dataset([row, row], tokenizer(), task=task)
    ]


ARRAY = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)


def png(array: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def pixels(image: Any) -> torch.Tensor:
    return encode_dataset([{"image": image, "label": 1}], processor(channels=3), task="image-classification")[0][
        "pixel_values"
    ]


@pytest.mark.parametrize(
    "image",
    [
        ARRAY,
        torch.as_tensor(ARRAY).permute(2, 0, 1),
        ARRAY.astype(np.int64),
        ARRAY.tolist(),
        {"bytes": png(ARRAY), "path": None},
        png(ARRAY),
        Image.fromarray(ARRAY).convert("RGBA"),
    ],
)
def test_every_form_of_an_image_gives_the_same_pixels(image: Any) -> None:
    assert torch.equal(pixels(image), pixels(Image.fromarray(ARRAY)))
    assert not torch.equal(pixels(image), pixels(Image.fromarray(ARRAY[::-1].copy())))


@pytest.mark.parametrize("image", [ARRAY[..., 0], torch.as_tensor(ARRAY[..., :1]).permute(2, 0, 1), png(ARRAY[..., 0])])
def test_grey_images_are_grey_in_every_form(image: Any) -> None:
    assert torch.equal(pixels(image), pixels(Image.fromarray(ARRAY[..., 0])))


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image.fromarray(np.ones((8, 8), np.uint16)), "mode I;16"),
        (Image.fromarray(np.ones((8, 8), np.int32)), "mode I "),
        (Image.fromarray(np.ones((8, 8), np.float32)), "mode F"),
        (png(np.ones((8, 8), np.uint16)), "mode I"),
        (np.ones((8, 8), np.uint16), "uint16 values"),
        (np.full((8, 8), 300), "int64 values"),
        (torch.rand(3, 8, 8), "float32 values"),
        (b"no image", "cannot be read"),
        ("missing.png", "cannot be read"),
        ({"bytes": None, "path": None}, "without bytes and path"),
        (None, "None as its image"),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_that_would_be_misread_is_an_error_that_names_its_row(image: Any, reason: str, channels: int) -> None:
    good = {"image": Image.fromarray(ARRAY[..., 0]), "label": 1}
    rows = encode_dataset(
        [good, {"image": image, "label": 1}], processor(channels=channels), task="image-classification", what="forget"
    )
    assert rows[0]["labels"] == 1
    with pytest.raises(DataError, match=f"row 1 of the forget set has .*{reason}"):
        rows[1]


@pytest.mark.parametrize(
    "values",
    [
        [0.5, None],
        [["a", "b"], ["c"]],
        [datetime.date(2024, 1, 1)] * 2,
        [b"a", b"b"],
        [None, "a"],
        [3, "unknown"],
        [{"a": 1}, {"a": 2}],
        [[1, "a"], [2]],
        [np.array(["a"]), np.array(["b"])],
    ],
)
def test_columns_that_no_model_takes_are_left_out(values: list[Any]) -> None:
    rows = [{**row, "extra": value} for row, value in zip(text_rows(2), values, strict=True)]
    assert PaddingCollator()(rows).keys() == {"input_ids", "attention_mask", "labels"}
    numbers = [{**row, "extra": 0.5} for row in text_rows(2)]
    assert "extra" in PaddingCollator()(numbers)


@pytest.mark.parametrize("name", ["input_ids", "labels", "attention_mask"])
def test_an_input_that_one_row_lacks_is_an_error(name: str) -> None:
    for broken in (None, "a", ["a"]):
        rows = [text_rows(2)[0], {**text_rows(2)[1], name: broken}]
        with pytest.raises(DataError, match=f"row 1 of a batch of 2 has .* in column '{name}'"):
            PaddingCollator()(rows)


SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}


def test_a_model_that_sees_what_follows_takes_no_rows_to_continue() -> None:
    masked, both_ways = BertForMaskedLM(BertConfig(**SMALL)), BertLMHeadModel(BertConfig(**SMALL))
    copied = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]
    for model in (masked, both_ways):
        for rows in (ROWS, copied):
            with pytest.raises(DataError, match="would only copy its labels"):
                encode_dataset(rows, tokenizer(), model=model)
    hidden = [{"input_ids": [5, 3, 7], "labels": [-100, 6, -100]}]
    assert encode_dataset(hidden, None, model=masked) is hidden
    decoder = BertLMHeadModel(BertConfig(**SMALL, is_decoder=True))
    for model in (decoder, tiny_llama()):
        assert len(encode_dataset(ROWS, tokenizer(), model=model)) == 2
    assert tiny_vit().config.num_channels == 1
