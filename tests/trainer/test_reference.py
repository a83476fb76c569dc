"""Laws of a reference model and of rehearsal: predictions go to the reference's, are stored once, and rows that are
rehearsed are not rows to judge by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from helpers.tiny import collate, sharpen, text_class_rows, text_rows, tiny_bert, tiny_llama
from helpers.training import FORGET, HOLDOUT, RETAIN, settings
from hf_unlearn.data.batches import PaddingCollator
from hf_unlearn.errors import DataError, SettingsError
from hf_unlearn.evaluation.content import content_masks, score_content, with_content
from hf_unlearn.losses import build_loss
from hf_unlearn.losses.original_outputs import INDEX
from hf_unlearn.models.forward import predict
from hf_unlearn.models.short_context import CONTEXT, predict_from_short_context
from hf_unlearn.trainer.outcome import outcome_of
from hf_unlearn.trainer.stopping import CONTENT_SHARE, FUNCTION_MARGIN
from hf_unlearn.trainer.trainer import UnlearningTrainer

MORE = text_rows(9, seed=3)


def base() -> nn.Module:
    return sharpen(tiny_llama(seed=9))


def model() -> nn.Module:
    return sharpen(tiny_llama())


def made(folder: Path, alpha: float = 0.0, reference: Any = None, **options: Any) -> UnlearningTrainer:
    options.setdefault("constraint", "none")
    names = ("holdout_dataset", "rehearsal_dataset")
    sets = {name: options.pop(name) for name in names if name in options}
    changes: dict[str, Any] = {"loss": "to_reference", "loss_settings": {"alpha": alpha}, "learning_rate": 2e-2}
    args = settings(folder, **{**changes, "max_steps": 30, "eval_strategy": "no", "row_stopping": False, **options})
    return UnlearningTrainer(model(), args, FORGET, reference_model=reference, **sets)


def smaller() -> nn.Module:
    other = tiny_llama()
    other.resize_token_embeddings(17)
    return other


@torch.no_grad()
def distance(one: nn.Module, other: nn.Module, rows: Any = FORGET) -> float:
    log_p_LV, log_q_LV = (predict(m.eval(), collate(rows)).logits_LV.log_softmax(-1) for m in (one, other))
    return (log_p_LV.exp() * (log_p_LV - log_q_LV)).sum(-1).mean().item()


def test_predictions_go_to_those_of_the_reference(tmp_path: Path) -> None:
    trainer = made(tmp_path, reference=base())
    before = distance(base(), trainer.model)
    trainer.train()
    assert distance(base(), trainer.model) < 0.3 * before
    pushed = UnlearningTrainer(
        model(), settings(tmp_path, loss="ce_u", constraint="none", learning_rate=2e-2, max_steps=30), FORGET
    )
    pushed.train()
    assert distance(base(), pushed.model) > before  # control: a loss without a target


def test_a_folder_and_a_model_give_the_same_run_and_predictions_are_stored_once(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    weights = []
    for number, reference in enumerate((base(), tmp_path / "base", str(tmp_path / "base"))):
        trainer = made(tmp_path / str(number), reference=reference)
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[1], weights[2])
    stored = tmp_path / "0" / "reference_outputs"
    assert json.loads((stored / INDEX).read_text())["contents"] == {"forget": "logits"}
    times = {path.name: path.stat().st_mtime_ns for path in stored.iterdir()}
    made(tmp_path / "0", reference=base())
    assert times == {path.name: path.stat().st_mtime_ns for path in stored.iterdir()}
    with pytest.raises(SettingsError, match="original outputs of other weights"):
        made(tmp_path / "0", reference=sharpen(tiny_llama(seed=10)))


def test_the_setting_names_it_too(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path / "base")  # type: ignore[operator]
    assert made(tmp_path / "run", reference_model=str(tmp_path / "base")).loss.name == "to_reference"


def test_a_reference_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    cases = {
        "the model's own weights": model(),
        "has 17 token embeddings and the model 29": smaller(),
    }
    for message, reference in cases.items():
        with pytest.raises(SettingsError, match=message) as error:
            made(tmp_path, reference=reference)
        assert "\n" not in str(error.value)


# Rehearsal


def test_rehearsed_rows_are_every_second_held_out_row_and_not_judged_by(tmp_path: Path) -> None:
    trainer = made(tmp_path, 3.0, base(), holdout_dataset=MORE)
    judged = trainer._stopping_rows["holdout"]
    assert judged is not None and trainer.rows_rehearsed == 4
    assert [judged[i] for i in range(len(judged))] == MORE[::2]
    assert trainer.train_dataset.retain is not None and "retain" in trainer.train_dataset[0]
    assert {str(row) for row in MORE[1::2]} == {str(trainer.train_dataset.retain[i]) for i in range(4)}
    assert trainer.report().method["rows_rehearsed"] == 4
    control = made(tmp_path, 0.0, base(), holdout_dataset=MORE)  # no retain term: all rows are judged by
    assert control.rows_rehearsed == 0 and len(control._stopping_rows["holdout"] or ()) == len(MORE)
    few = made(tmp_path, 3.0, base(), holdout_dataset=MORE[:3])
    assert few.rows_rehearsed == 0 and len(few._stopping_rows["holdout"] or ()) == 3


def test_rows_of_the_own_choice_are_rehearsed_beside_retain_rows(tmp_path: Path) -> None:
    args = settings(tmp_path, loss="npo", loss_settings={"retain": "kl"}, constraint="none")
    trainer = UnlearningTrainer(model(), args, FORGET, RETAIN, rehearsal_dataset=MORE, holdout_dataset=HOLDOUT)
    assert trainer.rows_rehearsed == len(MORE) and len(trainer.train_dataset.retain or ()) == len(MORE) + len(RETAIN)
    assert len(trainer._stopping_rows["holdout"] or ()) == len(HOLDOUT)
    likelihood = settings(tmp_path, loss="npo", constraint="none")  # its retain term would learn held-out rows by heart
    assert UnlearningTrainer(model(), likelihood, FORGET, RETAIN, holdout_dataset=MORE).rows_rehearsed == 0
    assert build_loss("npo").has_retain_term


def test_rehearsed_rows_keep_their_predictions(tmp_path: Path) -> None:
    drift = {}
    for alpha in (0.0, 10.0):
        trainer = made(tmp_path / str(alpha), alpha, base(), holdout_dataset=MORE)
        trainer.train()
        drift[alpha] = distance(model(), trainer.model, MORE[1::2]), distance(base(), trainer.model)
    assert drift[10.0][0] < 0.5 * drift[0.0][0]
    assert drift[10.0][1] < distance(base(), model())  # and the forget rows still go to the reference


# Stopping by content


def test_the_mark_is_a_share_of_the_reference_models_content_loss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = made(tmp_path, reference=base(), eval_strategy="steps", eval_steps=1, max_steps=200)
    masks = content_masks(model(), FORGET, PaddingCollator(), base())
    marked = with_content(FORGET, masks, base())
    assert 0 < sum(map(sum, masks)) < sum(len(row["labels"]) for row in FORGET)
    level = np.nanmean(score_content(base(), marked, PaddingCollator()).content_loss)
    trainer.train()
    outcome, log = trainer.outcome, trainer.state.log_history
    assert outcome is not None and outcome.metric == "content_loss" and outcome.status == "reached"
    assert outcome.mark == pytest.approx(CONTENT_SHARE * level, rel=1e-5)
    measured = score_content(trainer.model, marked, PaddingCollator())
    assert outcome.value == pytest.approx(np.nanmean(measured.content_loss), rel=1e-5) and outcome.value >= outcome.mark
    lines = [line for line in log if "eval_forget_content_loss" in line]
    limit = np.nanmean(score_content(base(), marked, PaddingCollator()).function_loss) + FUNCTION_MARGIN
    stops = [
        line["eval_forget_content_loss"] >= outcome.mark and line["eval_forget_function_loss"] <= limit
        for line in lines
    ]
    assert stops == [False] * (len(lines) - 1) + [True] and f"at most {limit:.3g}" in outcome.summary
    assert lines[-1]["eval_forget_function_loss"] == pytest.approx(np.nanmean(measured.function_loss), rel=1e-5)
    assert "forget content_loss has to rise to" in (err := capsys.readouterr().err) and "content loss" in err
    assert trainer.report().settings["forget_metric"] == "content_loss"
    assert all("content_mask" not in row for row in FORGET)  # the user's rows are not changed


def test_a_run_that_breaks_function_words_has_missed(tmp_path: Path) -> None:
    """The facts are forgotten, and with them other words; control: without a limit the mark is reached."""
    trainer = made(tmp_path, reference=base(), eval_strategy="steps", eval_steps=1, max_steps=200)
    stopping = trainer._stopping_callback()
    assert stopping is not None
    stopping.function_limit = -1.0  # which no run meets
    stopping.measure_before()
    for limit, status in ((-1.0, "missed"), (None, "reached")):
        stopping.function_limit = limit
        outcome = outcome_of(stopping, 100.0, steps=3, moved=True, budgets=(), function_loss=1.5)
        assert outcome.status == status and ("function words" in outcome.summary) == (limit is not None)
    stopping.function_limit = -1.0
    assert (
        "words that carry nothing are broken"
        in outcome_of(stopping, 100.0, steps=3, moved=True, budgets=(), function_loss=1.5).advice
    )
    trainer.args.max_steps = 3
    trainer.train()
    assert trainer.state.global_step == 3  # it went on


def test_other_metrics_stop_as_before(tmp_path: Path) -> None:
    trainer = made(tmp_path, reference=base(), holdout_dataset=HOLDOUT, forget_metric="probability")
    trainer.train()
    assert trainer.outcome is not None and trainer.outcome.metric == "probability"
    assert trainer._reference is not None and trainer._reference.content_loss is None


def test_without_content_there_is_nothing_to_forget(tmp_path: Path) -> None:
    """A model that finds no label of the rows more likely than its reference has not learned them."""
    near = model()
    with torch.no_grad():
        next(near.parameters()).add_(1e-4)
    with pytest.raises(DataError, match="nothing to forget: the model finds no label of the 4 forget rows"):
        made(tmp_path, reference=near)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "ce_u", "forget_metric": "content_loss"}, "is compared with a reference model; choose loss"),
        ({"loss": "to_reference", "adversary_steps": 2}, "compares probabilities, not content_loss"),
        ({"loss": "ce_u", "forget_metric": "content"}, "did you mean"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=message):
        settings(tmp_path, **changes)


def test_a_classifier_has_no_content(tmp_path: Path) -> None:
    rows = text_class_rows(4)
    with pytest.raises(SettingsError, match="needs the checkpoint before fine-tuning; pass reference_model"):
        UnlearningTrainer(tiny_bert(), settings(tmp_path, loss="to_reference", constraint="none"), rows)
    args = settings(tmp_path, loss="to_reference", constraint="none")
    with pytest.raises(SettingsError, match="set forget_metric to probability or accuracy"):
        UnlearningTrainer(tiny_bert(), args, rows, reference_model=tiny_bert(seed=3))
    args = settings(tmp_path / "other", loss="to_reference", constraint="none", forget_metric="accuracy")
    UnlearningTrainer(tiny_bert(), args, rows, reference_model=tiny_bert(seed=3)).train()


# Without a checkpoint before fine-tuning


def test_without_a_reference_model_the_target_is_the_own_prediction_from_a_short_context(tmp_path: Path) -> None:
    rows = text_rows(4, seed=2, lengths=(9, 10, 9, 10), prompt=4)
    original = model().eval()
    args = settings(
        tmp_path,
        loss="to_reference",
        loss_settings={"alpha": 0.0},
        constraint="none",
        learning_rate=2e-2,
        max_steps=60,
        forget_target=1e9,  # all steps
    )
    trainer = UnlearningTrainer(model(), args, rows)
    with torch.no_grad():
        target = predict_from_short_context(original, collate(rows)).logits_LV.log_softmax(-1)

    @torch.no_grad()
    def to_target() -> float:
        now = predict(trainer.model.eval(), collate(rows)).logits_LV.log_softmax(-1)
        return (target.exp() * (target - now)).sum(-1).mean().item()

    before = to_target()
    trainer.train()
    assert before > 0.1 and to_target() < 0.3 * before
    assert read_index(tmp_path)["context"] == CONTEXT
    assert trainer._reference is not None and "short context" in trainer._reference.source


def read_index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "reference_outputs" / INDEX).read_text())
