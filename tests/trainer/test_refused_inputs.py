"""Laws of what a trainer takes: it refuses in one line, before the run, what it cannot use."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import TrainingArguments

from helpers.texts import tokenizer
from helpers.tiny import tiny_bert, tiny_llama
from helpers.training import FORGET, HOLDOUT, RETAIN, settings
from hf_unlearn.errors import CoverageError, DataError, ModelError, SettingsError, UnlearningError
from hf_unlearn.models.readiness import check_base_model, check_loaded, check_saveable
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.trainer.config import REFUSED_SETTINGS
from hf_unlearn.trainer.inputs import COUNTERPARTS
from hf_unlearn.trainer.trainer import UnlearningTrainer

LORA = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "up_proj"], r=2)


def one_line(error: pytest.ExceptionInfo[Exception]) -> str:
    assert isinstance(error.value, UnlearningError) and "\n" not in str(error.value)
    return str(error.value)


# Settings

OTHER_VALUES: dict[str, Any] = {
    "train_sampling_strategy": "group_by_length",
    "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 1.0,
}


@pytest.mark.parametrize("name", REFUSED_SETTINGS)
def test_a_setting_that_cannot_be_kept_is_refused(name: str, tmp_path: Path) -> None:
    allowed = REFUSED_SETTINGS[name][0]
    if not hasattr(settings(tmp_path), name):
        pytest.skip("this version of transformers does not have it")
    other = OTHER_VALUES.get(name, not allowed)
    extra = {"dataloader_num_workers": 1} if "workers" in name else {}
    with pytest.raises(SettingsError, match=f"^{name}=") as error:
        settings(tmp_path, **{name: other}, **extra)
    assert repr(allowed) in one_line(error)


FOLLOWING: list[dict[str, Any]] = [
    {"load_best_model_at_end": True, "save_strategy": "epoch"},
    {"lr_scheduler_type": "reduce_lr_on_plateau"},
    {"load_best_model_at_end": True, "save_strategy": "epoch", "metric_for_best_model": "eval_loss"},
]


@pytest.mark.parametrize("following", FOLLOWING)
def test_what_follows_a_metric_names_one_of_a_split(following: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="set metric_for_best_model, such as forget_probability"):
        settings(tmp_path, **following)
    args = settings(tmp_path, eval_strategy="epoch", **(following | {"metric_for_best_model": "forget_probability"}))
    UnlearningTrainer(tiny_llama(), args, FORGET, RETAIN, holdout_dataset=HOLDOUT)  # and with one it is taken
    args = settings(tmp_path, eval_strategy="epoch", **(following | {"metric_for_best_model": "forget_nothing"}))
    with pytest.raises(SettingsError, match="'forget_nothing', but the evaluations of this run have forget_loss"):
        UnlearningTrainer(tiny_llama(), args, FORGET, RETAIN, holdout_dataset=HOLDOUT)


@pytest.mark.parametrize("name", ["warmup_stable_decay", "cosine_with_min_lr"])
def test_a_schedule_without_its_own_settings_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=f"lr_scheduler_type '{name}' with lr_scheduler_kwargs"):
        settings(tmp_path, lr_scheduler_type=name)
    own = {"num_decay_steps": 2} if name == "warmup_stable_decay" else {"min_lr": 0.0}
    settings(tmp_path, lr_scheduler_type=name, lr_scheduler_kwargs=own)


# Arguments


def test_arguments_of_other_trainers_name_their_counterpart(tmp_path: Path) -> None:
    args = settings(tmp_path)
    for name in COUNTERPARTS:
        with pytest.raises(SettingsError, match=f"no argument '{name}': pass ") as error:
            UnlearningTrainer(tiny_llama(), args, **{name: FORGET})
        one_line(error)
    with pytest.raises(SettingsError, match="no argument 'nonsense'"):
        UnlearningTrainer(tiny_llama(), args, FORGET, nonsense=1)
    for given, seen in ((TrainingArguments(str(tmp_path), use_cpu=True), "a TrainingArguments"), (None, "nothing")):
        with pytest.raises(SettingsError, match=f"args is {seen}; pass an UnlearningConfig"):
            UnlearningTrainer(tiny_llama(), given, FORGET)  # type: ignore[arg-type]


@pytest.mark.parametrize("what", ["forget", "retain", "holdout", "statistics"])
@pytest.mark.parametrize("kind", [dict, DatasetDict])
def test_several_splits_are_not_the_rows_of_one(what: str, kind: Any, tmp_path: Path) -> None:
    splits = kind({"train": Dataset.from_list(FORGET) if kind is DatasetDict else FORGET})
    with pytest.raises(DataError, match=re.escape(f"the {what} set is a {kind.__name__} with keys ['train']")):
        if what == "statistics":
            collect_statistics(tiny_llama(), splits, progress=False)
        else:
            sets = {"forget_dataset": FORGET, "retain_dataset": RETAIN, "holdout_dataset": HOLDOUT}
            UnlearningTrainer(tiny_llama(), settings(tmp_path), **{**sets, f"{what}_dataset": splits})


def test_raw_rows_are_evaluated_as_encoded_ones(tmp_path: Path) -> None:
    rows = [{"prompt": "who wrote", "completion": word} for word in ("anna", "paris")]
    forget = [{"prompt": "who wrote the red", "completion": "book"}]
    trainer = UnlearningTrainer(tiny_llama(), settings(tmp_path), forget, rows, processing_class=tokenizer())
    encoded = trainer._encoded(rows, "retain")
    assert trainer.evaluate(rows)["eval_loss"] == trainer.evaluate(encoded)["eval_loss"]
    assert trainer.evaluate({"a": rows})["eval_a_loss"] == trainer.evaluate(rows)["eval_loss"]
    assert trainer.predict(rows).metrics["test_loss"] == trainer.evaluate(rows)["eval_loss"]
    with pytest.raises(SettingsError, match="no rows to evaluate on"):
        trainer.evaluate()
    with pytest.raises(SettingsError, match="no evaluation split 'other'; there are none"):
        trainer.evaluate("other")


# Models


def test_weights_that_were_frozen_before_are_not_left_out_in_silence(tmp_path: Path) -> None:
    merged = get_peft_model(tiny_llama(), LORA).merge_and_unload()
    assert not any(p.requires_grad for p in merged.parameters())
    with pytest.raises(CoverageError, match="all 14 parameters that should train are frozen") as error:
        UnlearningTrainer(merged, settings(tmp_path), FORGET, RETAIN)
    one_line(error)
    UnlearningTrainer(merged.requires_grad_(True), settings(tmp_path), FORGET, RETAIN)
    partly = tiny_llama()
    partly.model.layers[0].requires_grad_(False)
    with pytest.raises(CoverageError, match="7 of 14 parameters"):
        UnlearningTrainer(partly, settings(tmp_path), FORGET, RETAIN)
    for asked in ({"freeze": ["model.layers.0.*"]}, {"train_only": ["model.layers.1.*"]}):
        coverage = UnlearningTrainer(partly, settings(tmp_path, **asked), FORGET, RETAIN).coverage
        assert len(coverage.protected) == 7


def test_an_earlier_run_does_not_narrow_the_next_in_silence(tmp_path: Path) -> None:
    model = tiny_llama()
    UnlearningTrainer(model, settings(tmp_path, train_only=["*.down_proj.weight"]), FORGET, RETAIN)
    with pytest.raises(CoverageError, match="12 of 14"):
        UnlearningTrainer(model, settings(tmp_path), FORGET, RETAIN)
    bert = tiny_bert()
    with pytest.raises(CoverageError, match="are frozen"):
        UnlearningTrainer(bert.requires_grad_(False), settings(tmp_path, constraint="none"), *classes())


def classes() -> tuple[list[Any], list[Any]]:
    rows = [{"input_ids": [k, 5, 6], "labels": k % 2} for k in range(8, 16)]
    return rows[:4], rows[4:]


def test_a_frozen_adapter_is_refused_and_frozen_base_weights_under_it_are_not(tmp_path: Path) -> None:
    tuned = get_peft_model(tiny_llama(), LORA)
    UnlearningTrainer(tuned, settings(tmp_path), FORGET, RETAIN)
    frozen = get_peft_model(tiny_llama(), LORA).requires_grad_(False)  # as PeftModel.from_pretrained gives it
    with pytest.raises(CoverageError, match="lora_A"):
        UnlearningTrainer(frozen, settings(tmp_path), FORGET, RETAIN)


ADAPTERS = {
    "lora": LORA,
    "embedding": LoraConfig(target_modules=["embed_tokens"], r=2),
    "saved module": LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], r=2),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_statistics_through_a_trained_adapter_are_not_those_of_the_base_model(kind: str) -> None:
    tuned = get_peft_model(tiny_llama(), ADAPTERS[kind])
    base = collect_statistics(tiny_llama(), RETAIN, progress=False)
    assert torch.equal(first_gram(collect_statistics(tuned, RETAIN, progress=False)), first_gram(base))
    for name, weight in tuned.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name or "modules_to_save.default" in name:
            nn.init.normal_(weight)
    for use in (lambda: collect_statistics(tuned, RETAIN, progress=False), lambda: base.check_model(tuned)):
        with pytest.raises(ModelError, match="has been trained") as error:
            use()
        one_line(error)
    with tuned.disable_adapter():
        assert torch.equal(first_gram(collect_statistics(tuned, RETAIN, progress=False)), first_gram(base))
        base.check_model(tuned)


def first_gram(statistics: Any) -> torch.Tensor:
    return next(iter(statistics.gram_sums.values()))


def test_a_model_that_cannot_be_saved_is_refused_before_the_run(tmp_path: Path) -> None:
    for part, name in (("generation_config", "temperature"), ("config", "own")):
        model = tiny_llama()
        check_saveable(model)
        setattr(getattr(model, part), name, 0.9 if name == "temperature" else object())
        with pytest.raises(ModelError, match="cannot be saved") as error:
            UnlearningTrainer(model, settings(tmp_path), FORGET, RETAIN)
        one_line(error)


def test_offloaded_weights_are_refused_by_name(tmp_path: Path) -> None:
    model = tiny_llama()
    check_loaded(model)
    check_base_model(model)
    model.model.layers[1].mlp.to("meta")
    for use in (
        lambda: collect_statistics(model, RETAIN, progress=False),
        lambda: UnlearningTrainer(model, settings(tmp_path), FORGET, RETAIN),
    ):
        with pytest.raises(ModelError, match=r"3 weights of LlamaForCausalLM are not in memory .*layers\.1\.mlp"):
            use()
