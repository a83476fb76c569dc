"""Laws of the checks: whatever names, configurations, rows and settings say is found before a model is loaded.

Loading weights is made to fail here. The negative control is a request without a fault, which gets that far.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import BertModel

from helpers.texts import tokenizer
from helpers.tiny import tiny_bert, tiny_gpt2
from hf_unlearn.benchmark.grid import run_grid
from hf_unlearn.deletion import build, run
from hf_unlearn.deletion.arguments import BenchmarkArguments, RunArguments
from hf_unlearn.deletion.build import build_request
from hf_unlearn.deletion.checks import class_names
from hf_unlearn.deletion.fine_tuning import FineTuning, fine_tuned
from hf_unlearn.deletion.rows import RowEncoding, load_splits
from hf_unlearn.deletion.run import audit_finished, collect_split, evaluate_finished, run_request
from hf_unlearn.errors import DataError, UnlearningError
from hf_unlearn.evaluation.attacks.subject import AuditSettings
from hf_unlearn.models.loading import load_model
from hf_unlearn.statistics.options import CollectionOptions
from hf_unlearn.trainer.config import UnlearningConfig


class LoadedError(Exception):
    """A model would be loaded."""


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """A classifier, its base model and a language model with a tokenizer; rows with texts and labels."""
    models: dict[str, Any] = {"classifier": tiny_bert(), "base": BertModel(tiny_bert().config), "lm": tiny_gpt2()}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    data = tmp_path / "data"
    data.mkdir()
    words = [word for word in tokenizer().get_vocab() if word.isalpha()][:8]
    rows = [{"text": f"{a} {b}", "label": i % 3} for i, (a, b) in enumerate((a, b) for a in words for b in words[:2])]
    splits = {"full": rows, "wide": [*rows[:4], {"text": rows[5]["text"], "label": 7}]}
    for name, split in splits.items():
        (data / f"{name}.json").write_text("\n".join(map(json.dumps, split)))
    return {name: str(tmp_path / name) for name in (*models, "data")}


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **options: Any) -> Any:
        raise LoadedError

    for module in (build, run):
        monkeypatch.setattr(module, "load_model", load)


def arguments(places: dict[str, str], **changes: Any) -> RunArguments:
    named = {"model_name_or_path": places["classifier"], "dataset_name": places["data"]}
    return RunArguments(**{**named, "train": "full", "forget": "full[0:3]", "max_rows": 4, **changes})


def config(folder: Path, **changes: Any) -> UnlearningConfig:
    return UnlearningConfig(str(folder / "out"), use_cpu=True, disable_tqdm=True, max_steps=1, **changes)


WRONG: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"metrics": "acuracy"}, {}, "unknown metric 'acuracy'; did you mean 'accuracy'"),
    ({"metrics": "membership_efficacy"}, {}, "needs a split test or holdout"),
    ({}, {"report_to": "wandbb"}, "unknown tracker 'wandbb' .*did you mean 'wandb'"),
    ({"task": "language-model"}, {}, "a model of task text-classification, and --task is language-model"),
    ({"task": "speech"}, {}, "unknown task 'speech'"),
    ({"samples": 1}, {}, "samples are answers of language models"),
    ({"retrained": "lm"}, {}, "the retrained model .* is a model of task language-model"),
    ({"retrained": "/missing/model"}, {}, "there is no such folder"),
    ({"fine_tune": True, "train": "", "retain": "full[3:6]"}, {}, "fine_tune needs rows to train on"),
    ({"retrained": "auto", "train": ""}, {"constraint": "none"}, "needs rows to retrain on"),
    ({"train": "", "retain": "full[3:6]"}, {}, "a constraint needs statistics"),
    ({"use_peft": True, "lora_target_modules": ["qury"]}, {}, "no module 'qury' .*did you mean 'query'"),
    ({"use_peft": True, "lora_r": 0}, {}, "LoRA settings: "),
    ({"num_labels": 3}, {}, "num_labels is the number of classes of a new head"),
    ({"fine_tune": True, "num_labels": 3}, {}, "has a head for text-classification already"),
    ({"fine_tune": True, "fine_tune_epochs": -1.0}, {}, "fine_tune_epochs must be at least 0"),
    ({"train": "wide", "forget": "wide[0:2]"}, {}, "row 4 of the train set has the label 7.* classes 0 to 4"),
    ({"fine_tune": True, "train": "wide", "forget": "wide[0:2]"}, {}, "the label 7.* pass a model that has this class"),
    ({"forget": "wide[0:5]"}, {}, "has the label 7"),
    ({"model_name_or_path": "base"}, {}, "is BertModel, which is a model of no task"),
    ({"model_name_or_path": "base", "task": "text-classification"}, {}, "has no head for text-classification"),
    ({"cache_dir": "data/full.json"}, {}, "the cache must be a folder"),
    ({}, {"loss": "grad_diff"}, "needs retain rows"),
]


def placed(places: dict[str, str], settings: dict[str, Any]) -> dict[str, Any]:
    """Replace the names of models and files by their paths."""
    known = {**places, "data/full.json": f"{places['data']}/full.json"}
    return {name: known.get(value, value) if isinstance(value, str) else value for name, value in settings.items()}


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(("changes", "settings", "seen"), WRONG, ids=[seen[:40] for _, _, seen in WRONG])
def test_a_wrong_request_is_refused_before_a_model_is_loaded(
    changes: dict[str, Any], settings: dict[str, Any], seen: str, places: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(UnlearningError, match=seen) as caught:
        run_request(arguments(places, **placed(places, changes)), config(tmp_path, **settings))
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_loading")
def test_a_request_without_a_fault_gets_as_far_as_loading(places: dict[str, str], tmp_path: Path) -> None:
    new_head = {"model_name_or_path": places["base"], "task": "text-classification", "fine_tune": True}
    for changes in ({}, {"task": "text-classification"}, {"metrics": "accuracy"}, new_head):
        with pytest.raises(LoadedError):
            run_request(arguments(places, **changes), config(tmp_path))


@pytest.mark.usefixtures("no_loading")
def test_the_other_commands_check_first_too(places: dict[str, str], tmp_path: Path) -> None:
    def collect(args: RunArguments, rows: str = "full", folder: Path = tmp_path / "statistics") -> Any:
        return collect_split(args, rows, CollectionOptions(), str(folder), overwrite=True)

    def attack(args: RunArguments, attacks: str | None = None) -> Any:
        return audit_finished(args, None, attacks, AuditSettings(), 2)

    def grid(args: RunArguments) -> Any:
        given = {"methods": "ce_u", "constraints": "none", "seeds": "0", **vars(args)}
        return run_grid(BenchmarkArguments(**{**given, "constraints": "none"}), config(tmp_path), tmp_path / "grid")

    os.mkfifo(tmp_path / "pipe")
    auto, wrong = arguments(places, retrained="auto"), arguments(places, task="seq2seq")
    wide, unknown = arguments(places, train="", forget="wide"), arguments(places, metrics="acuracy")
    for command, seen in (
        (lambda: evaluate_finished(auto, None, 2, 0), "retrained 'auto' fine-tunes a model, which only run and"),
        (lambda: attack(auto), "retrained 'auto' fine-tunes a model"),
        (lambda: attack(arguments(places), "relearnin"), "unknown attack 'relearnin'; did you mean 'relearning'"),
        (lambda: evaluate_finished(arguments(places), places["lm"], 2, 0), "the original model .* language-model"),
        (lambda: collect(wrong), "--task is seq2seq"),
        (lambda: collect(arguments(places), "wide"), "row 4 of the statistics set has the label 7"),
        (lambda: collect(arguments(places), folder=tmp_path / "pipe"), "is a FIFO"),
        *((lambda c=c: c(wrong), "--task is seq2seq") for c in (attack, grid)),
        *((lambda c=c: c(wide), "has the label 7") for c in (attack, lambda a: evaluate_finished(a, None, 2, 0))),
        *((lambda c=c: c(unknown), "unknown metric") for c in (grid, lambda a: evaluate_finished(a, None, 2, 0))),
    ):
        with pytest.raises(UnlearningError, match=seen):
            command()
    for command in (evaluate_finished, collect):
        with pytest.raises(LoadedError):
            command(arguments(places), None, 2, 0) if command is evaluate_finished else command(arguments(places))


def test_a_new_head_has_the_classes_of_the_rows(places: dict[str, str], tmp_path: Path) -> None:
    new_head = {"model_name_or_path": places["base"], "task": "text-classification", "fine_tune": True}
    args = arguments(places, **new_head, fine_tune_epochs=1.0, cache_dir=str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match="gets a new head"):
        request = build_request(args, config(tmp_path), fisher=False)
    assert request.models.original.config.num_labels == 3  # type: ignore[union-attr]
    wide = arguments(places, **new_head, eval_splits="wide")
    assert len(class_names(wide, "text-classification")) == 8
    named = tmp_path / "named"
    named.mkdir()
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    datasets.Dataset.from_dict({"text": ["a"], "label": [0]}, features=features).to_parquet(named / "full.parquet")
    of_feature = RunArguments("", str(named), forget="full")
    assert class_names(of_feature, "text-classification") == ["no", "yes"]
    given = RunArguments("", str(named), forget="full", num_labels=3)
    assert len(class_names(given, "text-classification")) == 3


@pytest.mark.parametrize(
    ("train", "forget", "copies", "seen"),
    [
        ("abcd", "ab", 0, None),
        ("abca", "a", 1, None),
        ("aabab", "ab", 3, None),
        ("abca", "aa", 0, None),
        ("abca", "az", 0, "1 forget rows are not in the train split .*first: row 1"),
        ("abcaaa", "ayz", 0, "2 forget rows are not in the train split"),
        ("abc", "aa", 0, "row 0 of the forget set is in it 2 times, and in the train split 'train' only 1 times"),
    ],
)
@pytest.mark.parametrize("names_retain", [False, True])
def test_copies_hide_no_missing_row(
    train: str, forget: str, copies: int, seen: str | None, names_retain: bool, tmp_path: Path
) -> None:
    for name, letters in {"train": train, "forget": forget, "rest": "cd"}.items():
        rows = [{"input_ids": [ord(x), 1], "labels": [ord(x), 1]} for x in letters]
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / f"{name}.parquet")
    args = RunArguments("", str(tmp_path), train="train", forget="forget", retain="rest" if names_retain else None)
    encoding = RowEncoding(task="language-model", max_length=None)
    if seen is not None:
        with pytest.raises(DataError, match=seen) as caught:
            load_splits(args, tokenizer(), encoding)
        assert not re.search(r"(?<!\w)-\d", str(caught.value))
        return
    found = load_splits(args, tokenizer(), encoding)
    assert len(found.copies) == copies and len(found.forget) == len(forget)
    if not names_retain:
        kept = [chr(row["input_ids"][0]) for row in found.evaluation.get("retain", [])]
        assert kept == [letter for letter in train if letter not in forget]
        assert len(kept) + len(found.copies) + len(forget) == len(train)


def test_all_copies_of_a_forget_row_are_subtracted(tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"input_ids": [i, i + 1, 3], "labels": [i, i + 1, 3]} for i in (4, 6, 8, 4)]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    from hf_unlearn.deletion.fulfil import prepare_request

    args = RunArguments(str(tmp_path / "model"), str(tmp_path), cache_dir=str(tmp_path / "cache"), train="train")
    args.forget = "train[0:1]"
    settings = config(tmp_path)
    prepared = prepare_request(build_request(args, settings, fisher=False), settings)
    assert prepared.retain_statistics is not None
    assert prepared.retain_statistics.rows == 2 and len(prepared.request.rows.forget) == 1


def test_a_fine_tuned_model_names_its_base_whether_it_comes_from_the_cache_or_not(
    places: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    from hf_unlearn.data.batches import default_collator

    rows = [{"input_ids": [4, 5, 6], "labels": [4, 5, 6], "attention_mask": [1, 1, 1]}] * 4

    def load(folder: Any) -> Any:
        return load_model(places["lm"] if folder is None else str(folder))

    logging.enable_progress_bar()
    settings, collator = FineTuning(epochs=1, batch_size=2), default_collator(tokenizer())
    for run_number in range(2):
        model, _ = fine_tuned(load, rows, settings, collator, tmp_path / "cache", title="fine-tuning the original")
        assert model.config._name_or_path == places["lm"]  # type: ignore[union-attr]
        assert str(model.__dict__["name_or_path"]).startswith(str(tmp_path / "cache"))  # where its weights are
        printed = capsys.readouterr()
        assert ("fine-tuning the original on 4 rows" in printed.err) == (run_number == 0)
        assert "train_runtime" not in printed.out + printed.err
    logging.disable_progress_bar()
