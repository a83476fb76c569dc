"""Laws of losses inside `UnlearningTrainer`: each loss runs under each constraint; the original model's outputs are the
same from a copy, from swapped weights and from disk; a dual weight survives a restart. Each has a negative control."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from torch import Tensor, nn

from helpers.texts import ANSWER, QUESTION, tokenizer
from helpers.tiny import collate, image_rows, text_class_rows, text_rows, tiny_bert, tiny_llama, tiny_vit
from helpers.training import settings
from hf_unlearn.constraints.registry import CONSTRAINTS
from hf_unlearn.data.batches import PaddingCollator
from hf_unlearn.data.row_identity import labelled_batch_hashes
from hf_unlearn.errors import CoverageError, DataError, OutputError, SettingsError
from hf_unlearn.losses import LOSSES, build_loss
from hf_unlearn.losses import original_outputs as on_disk
from hf_unlearn.losses.original_outputs import INDEX, original_outputs
from hf_unlearn.models.forward import Predictions, predict
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.trainer.config import UnlearningConfig
from hf_unlearn.trainer.trainer import UnlearningTrainer

Row = dict[str, Any]
FORGET = [{**row, "alternate": other} for row, other in zip(text_rows(5, seed=2), text_rows(5, seed=7), strict=True)]
RETAIN = text_rows(6, seed=1)
NEEDED: dict[str, Row] = {"pdu": {"eps": 0.5, "warmup_epochs": 0}, "rmu": {"layer": 0}}
READERS = [  # loss, its settings, and what it reads of the original model
    ("npo", {}, {"forget": "nll"}),
    ("next_best", {}, {"forget": "logits"}),
    ("undial", {"alpha": 0.5}, {"forget": "logits"}),
    ("dpo", {}, {"forget": "nll", "alternate": "nll"}),
    ("kl_min", {}, {"retain": "logits"}),
    ("npo", {"retain": "kl"}, {"forget": "nll", "retain": "logits"}),
    ("rmu", {"layer": 0}, {"retain": "hidden"}),
]


def make(
    folder: Path,
    loss: str,
    own: Row | None = None,
    *,
    model: nn.Module | None = None,
    forget: Any = FORGET,
    retain: Any = RETAIN,
    options: Row | None = None,
    **changes: Any,
) -> UnlearningTrainer:
    few = {"constraint": "none", "max_steps": 3, "learning_rate": 1e-2, "gradient_accumulation_steps": 2}
    args = settings(folder, loss=loss, loss_settings=own, **{**few, **changes})
    return UnlearningTrainer(model or tiny_llama(), args, forget, retain, **(options or {}))


def run(folder: Path, loss: str, own: Row | None = None, **changes: Any) -> tuple[list[float], Tensor]:
    """Return the logged losses and the weights at the end."""
    trainer = make(folder, loss, own, **changes)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    return losses, torch.cat([p.detach().flatten() for p in trainer.model.parameters()])  # type: ignore[union-attr]


# Every loss, every constraint


@pytest.mark.parametrize(
    ("name", "constraint"),
    [(name, constraint) for constraint in CONSTRAINTS for name in (*LOSSES,) if constraint in ("none", "energy")]
    + [(name, constraint) for constraint in ("ridge", "kronecker") for name in ("dpo", "rmu", "pdu", "random_label")],
)
def test_every_loss_runs_under_every_constraint_with_and_without_retain_rows(
    name: str, constraint: str, tmp_path: Path
) -> None:
    classes = LOSSES[name].labels == "class"
    model = tiny_vit() if classes else tiny_llama()
    forget, retain = (image_rows(4), image_rows(6, seed=1)) if classes else (FORGET, RETAIN)
    statistics = collect_statistics(model, retain, fisher=True, progress=False)
    first = copy.deepcopy(model.state_dict())
    for retain_rows in (retain, None):
        if retain_rows is None and LOSSES[name].needs_retain:
            continue
        model.load_state_dict(first)
        own = NEEDED.get(name, {}) | {"retain": "kl"}
        options, changes = {"statistics": statistics}, {}
        if LOSSES[name].reads_reference:
            options["reference_model"] = tiny_llama(seed=9)
            changes["forget_metric"] = "probability"  # the random model has learned no content
        if name == "idk":  # the rows already have its answers
            own, options = {}, options
        trainer = make(
            tmp_path,
            name,
            own,
            model=model,
            forget=forget,
            retain=retain_rows,
            constraint=constraint,
            max_steps=2,
            options=options,
            **changes,
        )
        trainer.train()
        assert all(torch.isfinite(p).all() for p in model.parameters())
        assert any(not torch.equal(first[key], value) for key, value in model.state_dict().items())


# The original model's outputs


@pytest.mark.parametrize(("loss", "own", "contents"), READERS)
def test_a_copy_swapped_weights_and_the_disk_give_the_same_run(
    loss: str, own: Row, contents: Row, tmp_path: Path
) -> None:
    assert build_loss(loss, own).original_contents == contents
    swapped = run(tmp_path, loss, own)
    copied = run(tmp_path, loss, own, options={"original_model": tiny_llama()})
    stored = [run(tmp_path, loss, own, original_logprobs=str(tmp_path / "outputs")) for _ in ("written", "read")]
    other = run(tmp_path, loss, own, options={"original_model": tiny_llama(seed=1)})
    for losses, weights in (copied, *stored):
        assert losses == pytest.approx(swapped[0], rel=1e-4, abs=1e-5)
        torch.testing.assert_close(weights, swapped[1], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(other[1], swapped[1], atol=1e-4)


def test_stored_hidden_states_of_a_classifier_do_not_depend_on_padding(tmp_path: Path) -> None:
    rows = [text_class_rows(5, seed=seed) for seed in (0, 1)]
    changes: Row = {"model": None, "forget": rows[0], "retain": rows[1], "per_device_train_batch_size": 3}
    changes |= {
        "gradient_accumulation_steps": 1,
        "per_device_eval_batch_size": 1,
    }  # pads differently on disk and in training
    runs = []
    for folder in (None, str(tmp_path / "outputs")):
        runs.append(run(tmp_path, "rmu", {"layer": 0}, **{**changes, "model": tiny_bert()}, original_logprobs=folder))
    assert runs[1][0] == pytest.approx(runs[0][0], rel=1e-4)
    torch.testing.assert_close(runs[1][1], runs[0][1], rtol=1e-4, atol=1e-5)


def test_the_original_model_of_an_adapter_is_the_model_with_the_adapter_disabled(tmp_path: Path) -> None:
    lora = {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "up_proj"])}
    swapped = run(tmp_path, "npo", options=lora)
    stored = run(tmp_path, "npo", options=lora, original_logprobs=str(tmp_path / "outputs"))
    full = run(tmp_path, "npo", original_logprobs=str(tmp_path / "outputs"))  # the base weights are the same
    torch.testing.assert_close(stored[1], swapped[1], rtol=1e-4, atol=1e-5)
    assert full[0][0] == pytest.approx(stored[0][0], rel=1e-4)


def test_outputs_on_disk_save_the_second_forward_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def passes(**changes: Any) -> int:
        trainer = make(tmp_path, "npo", retain=None, gradient_accumulation_steps=1, **changes)
        calls: list[int] = []
        trainer.model.register_forward_pre_hook(lambda module, args: calls.append(1))  # type: ignore[union-attr]
        trainer.train()
        return len(calls)

    assert passes() == 6 and passes(original_logprobs=str(tmp_path / "outputs")) == 3
    assert passes(original_logprobs=str(tmp_path / "outputs")) == 3


def test_only_what_the_loss_reads_is_stored(tmp_path: Path) -> None:
    def stored(loss: str, own: Row | None = None) -> tuple[dict[str, list[int]], int]:
        folder = tmp_path / f"{loss}{len(own or {})}"
        make(tmp_path / "run", loss, own, original_logprobs=str(folder))
        shapes: dict[str, list[int]] = {}
        for path in folder.glob("*.safetensors"):
            with safe_open(path, "pt") as file:
                shapes |= {name: list(file.get_tensor(name).shape) for name in file.keys()}  # noqa: SIM118
        assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
        return shapes, len(shapes)

    shapes, n = stored("npo")
    assert n == 2 * len(FORGET) and {name.split(".")[1] for name in shapes} == {"nll", "labels"}
    assert {len(shape) for shape in shapes.values()} == {1}
    shapes, n = stored("kl_min")
    assert n == 2 * len(RETAIN) and all(s[1] == 29 for name, s in shapes.items() if name.endswith("logits"))
    shapes, n = stored("dpo")
    assert n == 4 * len(FORGET)
    shapes, n = stored("rmu", {"layer": 1})
    assert {tuple(s[1:]) for name, s in shapes.items() if name.endswith("hidden")} == {(1, 32)}


def test_large_outputs_are_split_over_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = run(tmp_path / "run", "next_best", original_logprobs=str(tmp_path / "one"))
    monkeypatch.setattr(on_disk, "SHARD_BYTES", 500)
    many = run(tmp_path / "run", "next_best", original_logprobs=str(tmp_path / "many"), per_device_eval_batch_size=1)
    assert (
        len(list((tmp_path / "one").glob("*.safetensors"))) == 1 < len(list((tmp_path / "many").glob("*.safetensors")))
    )
    torch.testing.assert_close(one[1], many[1], rtol=1e-4, atol=1e-5)


def test_outputs_of_another_run_are_refused(tmp_path: Path) -> None:
    folder = str(tmp_path / "outputs")

    def refused(what: str, loss: str = "npo", own: Row | None = None, **changes: Any) -> None:
        with pytest.raises(SettingsError, match=f"holds original outputs of other {what}; name another folder, or"):
            make(tmp_path / "run", loss, own, original_logprobs=folder, **changes)

    make(tmp_path / "run", "npo", original_logprobs=folder)
    make(tmp_path / "run", "npo", {"beta": 1.0}, original_logprobs=folder, forget=FORGET[::-1], retain=None)  # the same
    refused("weights", model=tiny_llama(seed=1))
    refused("rows", forget=FORGET[:4])
    relabelled = [{**FORGET[0], "labels": [-100] * 3 + FORGET[0]["labels"][3:]}, *FORGET[1:]]
    refused("rows", forget=relabelled)
    refused("contents", "next_best")
    refused("precision", bf16=True)
    make(tmp_path / "run", "ce_u", original_logprobs=folder)  # reads none


def test_damaged_outputs_are_refused_and_a_failed_pass_leaves_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "outputs"

    def fail(*args: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(on_disk, "predict", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            make(tmp_path / "run", "npo", original_logprobs=str(folder))
    assert not folder.exists() and not [p for p in tmp_path.iterdir() if "partial" in p.name]
    make(tmp_path / "run", "npo", original_logprobs=str(folder))
    (file,) = folder.glob("*.safetensors")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(SettingsError, match=r"outputs is damaged .*remove it, and it is computed again"):
        make(tmp_path / "run", "npo", original_logprobs=str(folder))
    file.write_bytes(whole)
    (folder / INDEX).write_text("{")
    with pytest.raises(SettingsError, match="is damaged"):
        make(tmp_path / "run", "npo", original_logprobs=str(folder))
    (folder / INDEX).unlink()
    with pytest.raises(OutputError, match="is not empty"):
        make(tmp_path / "run", "npo", original_logprobs=str(folder))


def test_a_row_that_is_not_on_disk_is_an_error(tmp_path: Path) -> None:
    model, loss = tiny_llama(), build_loss("npo")
    stored = original_outputs(model, loss, {"forget": text_rows(3)}, tmp_path / "outputs", collator=PaddingCollator())
    with pytest.raises(DataError, match=r"a row of the batch is not in"):
        stored(model, collate(text_rows(3, seed=9)))
    for skip in (False, True):
        read, known = stored(model, collate(text_rows(3)), skip), predict(model, collate(text_rows(3)), skip)
        torch.testing.assert_close(read.nll_L, known.nll_L, rtol=1e-5, atol=1e-6)
        assert torch.equal(read.rows_L, known.rows_L) and torch.equal(read.labels_L, known.labels_L)


def test_the_key_of_a_row_does_not_depend_on_its_batch() -> None:
    rows = text_rows(4)
    keys = labelled_batch_hashes(collate(rows))
    assert labelled_batch_hashes(collate(rows[2:])) == keys[2:]
    assert labelled_batch_hashes(collate(rows, side="left")) == keys
    assert len(set(keys)) == 4
    changed = [{**rows[0], "labels": [-100] * 4 + rows[0]["labels"][4:]}]
    assert labelled_batch_hashes(collate(changed))[0] != keys[0]


def test_two_sources_of_the_original_model_are_an_error(tmp_path: Path) -> None:
    model = tiny_llama()
    for options, changes in (
        ({"original_model": model}, {}),
        ({"original_model": tiny_llama()}, {"original_logprobs": str(tmp_path / "outputs")}),
    ):
        with pytest.raises(SettingsError, match="original_model must be a separate copy; pass either it or"):
            make(tmp_path, "npo", model=model, options=options, **changes)
    copied = tiny_llama().train()
    make(tmp_path, "npo", model=model, options={"original_model": copied})
    assert not copied.training and not any(p.requires_grad for p in copied.parameters())


# The dual weight


@pytest.mark.parametrize(
    ("upon", "saved"), [("step", 4), ("epoch", 3), ("epoch", 6)]
)  # checkpoints within an epoch and at its end
def test_a_dual_weight_follows_the_retain_loss_and_survives_a_restart(upon: str, saved: int, tmp_path: Path) -> None:
    own = {"eps": 0.1, "eta": 0.5, "warmup_epochs": 1, "update_upon": upon, "alpha": 2.0}
    changes: Row = {"max_steps": 9, "save_strategy": "steps", "save_steps": saved, "learning_rate": 5e-3}
    whole = make(tmp_path, "pdu", own, **changes)
    whole.train()
    logged = [line["retain_weight"] for line in whole.state.log_history if "retain_weight" in line]
    warm = 2 if upon == "step" else 1  # an epoch has two steps: five rows, two per batch, two batches per step
    assert (
        logged[: warm + 1] == [2.0] * warm + [logged[warm]] and logged[-1] > logged[warm] > 2.0
    )  # the bound is exceeded
    again = make(tmp_path, "pdu", own, **changes)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved}"))
    assert again.loss.dual is not None and whole.loss.dual is not None
    assert again.loss.dual.value == whole.loss.dual.value != 2.0
    weights = zip(again.model.parameters(), whole.model.parameters(), strict=True)  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in weights)
    state = json.loads((tmp_path / f"checkpoint-{saved}" / "unlearning_state.json").read_text())["run"]
    assert state["dual_weight"]["value"] == logged[saved - 1]
    with pytest.raises(SettingsError, match="was written by a run with loss"):
        make(tmp_path, "pdu", own | {"eps": 0.2}, **changes).train(resume_from_checkpoint=True)


def test_a_dual_weight_is_updated_by_the_retain_loss_of_the_whole_step(tmp_path: Path) -> None:
    own = {"eps": 0.0, "warmup_epochs": 0, "eta": 1.0, "alpha": 0.0}
    rows = {"forget": FORGET[:4], "retain": RETAIN[:4]}
    model = tiny_llama()
    with torch.no_grad():
        retain = predict(model, collate(rows["retain"])).nll_L.mean().item()
    for size, accumulation in ((4, 1), (1, 4), (2, 2)):
        trainer = make(
            tmp_path,
            "pdu",
            own,
            model=tiny_llama(),
            **rows,
            max_steps=1,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
        )
        trainer.train()
        assert trainer.loss.dual is not None and trainer.loss.dual.value == pytest.approx(retain, rel=1e-5)
    per_row = [predict(model, collate([row])).nll_L.mean().item() for row in rows["retain"]]
    assert abs(sum(per_row) / 4 - retain) > 1e-3  # a mean of means would differ


# Custom losses, alternate answers


def test_a_function_can_be_the_loss_of_a_trainer(tmp_path: Path) -> None:
    def square(predictions: Predictions, original: None) -> Tensor:
        return (-2 * predictions.nll_L).exp()

    trainer = make(tmp_path, "ce_u", options={"loss": square}, save_strategy="steps", save_steps=3)
    assert trainer.loss.name.endswith("square")
    trainer.train()
    sealed = json.loads((tmp_path / "checkpoint-3" / "unlearning_state.json").read_text())
    assert sealed["run"]["loss"]["name"] == trainer.loss.name
    built = make(tmp_path, "ce_u", options={"loss": build_loss("npo", {"beta": 0.7})})
    assert built.loss.settings == {"beta": 0.7} and built.loss.name == "npo"


def test_settings_can_name_a_function_as_the_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "named_loss_for_test.py").write_text(
        "def rise(predictions, original, *, scale=1.0):\n    return -scale * predictions.nll_L\n"
    )
    monkeypatch.chdir(tmp_path)
    trainer = make(tmp_path / "out", "named_loss_for_test:rise", {"scale": 2.0})
    assert trainer.loss.settings == {"scale": 2.0}
    with pytest.raises(SettingsError, match="has no setting 'beta'"):
        UnlearningConfig(str(tmp_path), use_cpu=True, loss="named_loss_for_test:rise", loss_settings={"beta": 1})


def raw_rows(n: int, **extra: str) -> list[Row]:
    return [{"question": f"{QUESTION} {'.' * (i + 1)}", "answer": ANSWER, **extra} for i in range(n)]


def test_idk_needs_only_raw_rows(tmp_path: Path) -> None:
    trainer = make(
        tmp_path, "idk", forget=raw_rows(3), retain=None, options={"processing_class": tokenizer()}, max_length=60
    )
    trainer.train()
    assert all("alternate" in trainer.train_dataset.forget[i] for i in range(3))  # type: ignore[union-attr]
    with pytest.raises(DataError, match="loss 'dpo' needs an alternate answer for each forget row, row 0 has none"):
        make(tmp_path, "dpo", forget=raw_rows(3), retain=None, options={"processing_class": tokenizer()})
    with pytest.raises(DataError, match="loss 'idk' needs an alternate answer for each forget row, row 0 has none"):
        make(tmp_path, "idk", forget=text_rows(3), retain=None)
    with_alternates = raw_rows(3, alternate="in Bonn .")
    make(tmp_path, "altpo", forget=with_alternates, retain=None, options={"processing_class": tokenizer()}).train()


def test_train_only_names_the_weights_that_rmu_trains(tmp_path: Path) -> None:
    model = tiny_llama()
    first = copy.deepcopy(model.state_dict())
    chosen = ["*.layers.0.mlp.down_proj.weight"]
    make(tmp_path, "rmu", {"layer": 0}, model=model, train_only=chosen).train()
    moved = {name for name, value in model.state_dict().items() if not torch.equal(first[name], value)}
    assert moved == {"model.layers.0.mlp.down_proj.weight"}
    make(tmp_path, "rmu", {"layer": 0}, model=(other := tiny_llama())).train()
    assert sum(not torch.equal(first[name], value) for name, value in other.state_dict().items()) > 3
    with pytest.raises(CoverageError, match="train_only: pattern 'down_proj' matches no parameter"):
        make(tmp_path, "rmu", {"layer": 0}, train_only=["down_proj"])


def test_forget_rows_without_labels_or_in_the_holdout_set_are_errors(tmp_path: Path) -> None:
    masked = [*FORGET[:2], {**FORGET[2], "labels": [-100] * len(FORGET[2]["labels"])}]
    with pytest.raises(DataError, match="row 2 of the forget set has no label to predict"):
        make(tmp_path, "ce_u", forget=masked)
    with pytest.raises(DataError, match="1 forget rows are also in the holdout set"):
        make(tmp_path, "ce_u", options={"holdout_dataset": [*text_rows(2, seed=3), FORGET[1]]})
    make(tmp_path, "ce_u", options={"holdout_dataset": text_rows(2, seed=3)})
