"""Laws of loading: what is saved is loaded in float32, and what cannot be loaded is one error that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.texts import tokenizer
from helpers.tiny import tiny_bert, tiny_llama
from hf_unlearn.errors import ModelError, SettingsError
from hf_unlearn.models.loading import load_model, load_model_and_processor, load_processor, load_tokenizer


def test_a_model_is_loaded_in_float32_and_eval_mode(tmp_path: Path) -> None:
    model = tiny_llama().bfloat16()
    model.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert loaded.dtype == torch.float32 and not loaded.training
    assert all(torch.equal(loaded.state_dict()[name], value.float()) for name, value in model.state_dict().items())


def test_the_class_comes_from_the_configuration_where_no_task_is_named(tmp_path: Path) -> None:
    tiny_bert().save_pretrained(tmp_path)
    passed = tokenizer()
    model, processor = load_model_and_processor(tmp_path, passed)
    assert type(model).__name__ == "BertForSequenceClassification" and processor is passed


@pytest.mark.parametrize("load", [load_model, load_tokenizer, load_model_and_processor])
def test_a_missing_folder_is_an_error_that_names_it(load: Any, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    with pytest.raises(ModelError, match=r"cannot load the .*missing'") as caught:
        load(missing)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("load", [load_model, load_processor])
def test_an_unknown_task_is_an_error_that_lists_the_tasks(load: Any) -> None:
    with pytest.raises(SettingsError, match="unknown task 'poetry'; choose from language-model, seq2seq"):
        load("some/model", "poetry")
