"""Laws of the task: it is the one that the model was trained for, and no weight of a model is left out or drawn at
random unless a new head is to be trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    BertForMaskedLM,
    BertForTokenClassification,
    BertModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTModel,
)

from helpers.tiny import tiny_bert, tiny_gpt2, tiny_llama, tiny_vit
from hf_unlearn.errors import ModelError, SettingsError
from hf_unlearn.models.loading import choose_task, load_model, load_model_and_processor, outline
from hf_unlearn.models.tasks import Task

TINY_T5 = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}


def made(kind: str) -> PreTrainedModel:
    bert: Any = tiny_bert().config
    models: dict[str, Any] = {
        "gpt2": tiny_gpt2,
        "llama": tiny_llama,
        "bert": tiny_bert,
        "vit": tiny_vit,
        "ner": lambda: BertForTokenClassification(bert),
        "t5": lambda: T5ForConditionalGeneration(T5Config(**TINY_T5)),
        "base": lambda: BertModel(bert),
        "base vit": lambda: ViTModel(tiny_vit().config),
        "masked": lambda: BertForMaskedLM(bert),
    }
    return models[kind]()


TASKS: dict[str, Task] = {
    "gpt2": "language-model",
    "llama": "language-model",
    "bert": "text-classification",
    "vit": "image-classification",
    "ner": "token-classification",
    "t5": "seq2seq",
}


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    def save(kind: str) -> str:
        made(kind).save_pretrained(tmp_path / kind)
        return str(tmp_path / kind)

    return save


@pytest.mark.parametrize("kind", TASKS)
def test_the_task_is_that_of_the_architecture_and_no_other_is_accepted(kind: str, saved: Any) -> None:
    name = saved(kind)
    assert choose_task(name, None) == choose_task(name, TASKS[kind]) == TASKS[kind]
    assert type(load_model(name)).__name__ == AutoConfig.from_pretrained(name).architectures[0]
    for other in set(TASKS.values()) - {TASKS[kind]}:
        with pytest.raises(SettingsError, match=f"a model of task {TASKS[kind]}, and --task is {other}") as caught:
            choose_task(name, other)
        assert "\n" not in str(caught.value)
        with pytest.raises(ModelError):  # the negative control: without the first check, the weights show it
            load_model(name, other)


@pytest.mark.parametrize("kind", ["base", "base vit", "masked"])
def test_a_model_without_a_head_is_no_original_unless_a_head_is_trained(kind: str, saved: Any) -> None:
    name, task = saved(kind), TASKS["vit" if "vit" in kind else "bert"]
    with pytest.raises(ModelError, match=r"pass --task .* and --fine_tune True to train a new head"):
        choose_task(name, None, new_head=True)
    with pytest.raises(ModelError, match="has no head for"):
        choose_task(name, task)
    assert choose_task(name, task, new_head=True) == task
    with pytest.raises(ModelError, match="drawn at random"):
        load_model(name, task)
    with pytest.warns(UserWarning, match="gets a new head") as told:
        model = load_model(name, task, new_head=True, classes=["a", "b", "c"])
    assert len([w for w in told if "new head" in str(w.message)]) == 1
    assert model.config.num_labels == 3 and model.config.id2label == {0: "a", 1: "b", 2: "c"}
    again = load_model(name, task, new_head=True, classes=["a", "b", "c"])
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    body, loaded = AutoModel.from_pretrained(name).state_dict(), model.state_dict()
    body = {f"{model.base_model_prefix}.{key}": value for key, value in body.items() if "pooler" not in key}
    assert len(body) > 20 and all(torch.equal(value, loaded[key]) for key, value in body.items())


def test_a_language_model_may_get_a_classifier_and_a_classifier_no_other_head(saved: Any) -> None:
    assert choose_task(saved("llama"), "text-classification", new_head=True) == "text-classification"
    with pytest.raises(SettingsError, match="a model of task text-classification"):
        choose_task(saved("bert"), "token-classification", new_head=True)


def test_a_checkpoint_that_lacks_weights_of_the_body_is_refused_with_a_new_head_too(tmp_path: Path) -> None:
    model = made("base")
    state = {key: value for key, value in model.state_dict().items() if "layer.1" not in key}
    model.save_pretrained(tmp_path, state_dict=state)
    for new_head in (False, True):
        with pytest.raises(ModelError, match=r"lacks .*layer\.1.* which would be drawn at random"):
            load_model(str(tmp_path), "text-classification", new_head=new_head, classes=["a", "b"])


@pytest.mark.parametrize("left_out", [True, False], ids=["too many", "too few"])
def test_every_loader_counts_the_weights(left_out: bool, tmp_path: Path) -> None:
    model = tiny_llama()
    state = dict(model.state_dict())
    if left_out:
        state["model.layers.0.mlp.third_proj.weight"] = torch.ones(2, 2)
    else:
        del state["model.layers.0.mlp.up_proj.weight"]
    model.save_pretrained(tmp_path, state_dict=state)
    for load in (load_model, lambda name: load_model_and_processor(name, processing_class=object())):
        with pytest.raises(ModelError, match="left out" if left_out else "drawn at random"):
            load(str(tmp_path))


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    tiny_llama(tied=True).save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).config.tie_word_embeddings


def test_the_outline_is_the_model_without_weights(saved: Any) -> None:
    for kind, task in TASKS.items():
        name = saved(kind)
        shapes = {key: value.shape for key, value in outline(name, task).state_dict().items()}
        assert shapes == {key: value.shape for key, value in load_model(name).state_dict().items()}
        assert outline(name, task).device.type == "meta"
    with pytest.raises(ModelError, match="has no model of task image-classification"):
        outline(saved("llama"), "image-classification")


def test_an_adapter_is_loaded_on_its_base_model(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    tiny_llama().save_pretrained(tmp_path / "base")
    adapted = get_peft_model(load_model(str(tmp_path / "base")), LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    assert choose_task(str(tmp_path / "adapter"), None) == "language-model"
    assert "lora_A" in " ".join(load_model(str(tmp_path / "adapter")).state_dict())
