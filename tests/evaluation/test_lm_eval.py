"""lm-evaluation-harness on a task of our own, read from local files: the accuracy that logits by hand give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.tiny import requires_asset
from hf_unlearn.cli import main
from hf_unlearn.errors import SettingsError
from hf_unlearn.evaluation import lm_eval as harness
from hf_unlearn.evaluation.lm_eval import harness_metrics
from hf_unlearn.models.loading import load_model, load_tokenizer

pytest.importorskip("lm_eval")
QUESTIONS = [
    {"question": "The sun is", "choices": [" hot", " blue", " a box"], "answer": 0},
    {"question": "Lily saw a big", "choices": [" of", " dog", " the"], "answer": 1},
    {"question": "Once upon a", "choices": [" day", " time", " cat"], "answer": 1},
    {"question": "Tom was very", "choices": [" run", " happy", " sad"], "answer": 2},
    {"question": "They lived", "choices": [" happily", " of", " blue"], "answer": 2},
]
TASK = """task: our_questions
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    data, folder = tmp_path / "questions.json", tmp_path / "tasks"
    data.write_text("\n".join(map(json.dumps, QUESTIONS)))
    folder.mkdir()
    (folder / "our_questions.yaml").write_text(TASK.format(data=data))
    return folder


def by_hand(model: Any, tokenizer: Any) -> float:
    """Share of questions whose right choice has the largest log-likelihood after the question."""
    right = 0
    for row in QUESTIONS:
        scores = []
        for choice in row["choices"]:  # type: ignore[union-attr]
            head = tokenizer(row["question"])["input_ids"]
            whole = tokenizer(row["question"] + choice)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
            scores.append(sum(float(logits[i - 1, whole[i]]) for i in range(len(head), len(whole))))
        right += max(range(3), key=scores.__getitem__) == row["answer"]
    return right / len(QUESTIONS)


def test_accuracy_is_what_the_logits_say(tasks: Path) -> None:
    folder = str(requires_asset("stories260K"))
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    model.train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    (result,) = harness_metrics(model, tokenizer, ["our_questions"], include_path=str(tasks), name="original")
    assert (result.name, result.split, result.model, result.n) == ("our_questions_acc", "lm_eval", "original", 5)
    assert model.training and all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert result.value == pytest.approx(by_hand(model.eval(), tokenizer)) and 0 < result.value < 1
    assert result.low is not None and result.high is not None and result.low < result.value < result.high
    (few,) = harness_metrics(model, tokenizer, ["our_questions"], include_path=str(tasks), limit=2)
    assert few.n == 2


def test_a_task_that_cannot_be_evaluated_is_an_error(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="has no task no_such_task"):
        harness_metrics(torch.nn.Linear(1, 1), None, ["no_such_task"], include_path=str(tasks))
    with monkeypatch.context() as patch, pytest.raises(SettingsError, match="on one process"):
        patch.setattr(harness, "world", lambda: (0, 2))
        harness_metrics(torch.nn.Linear(1, 1), None, ["our_questions"])
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"pip install 'hf_unlearn\[lm-eval\]'"):
        harness_metrics(torch.nn.Linear(1, 1), None, ["our_questions"])


@pytest.mark.slow
def test_wmdp_from_local_folders(tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Corpora and questions in the Hub's layout, the questions' task by another name."""
    folder = str(requires_asset("stories260K"))
    data = tmp_path / "data"
    data.mkdir()
    for name, words in (("cyber-forget-corpus", "The cat ran to"), ("cyber-retain-corpus", "A bird sat on")):
        rows = [{"text": f"{words} the {thing}."} for thing in ("house", "tree", "park", "car")]
        (data / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    line = ["wmdp", "--model_name_or_path", folder, "--dataset_name", str(data), "--cache_dir", str(tmp_path / "cache")]
    line += ["--methods", "npo", "--constraints", "energy", "--seeds", "0", "--lm_eval_tasks", "our_questions"]
    line += ["--lm_eval_include_path", str(tasks), "--max_steps", "1", "--eval_strategy", "no", "--use_cpu", "True"]
    assert main(["benchmark", *line, "--output_dir", str(tmp_path / "out"), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    evaluated = {m["model"] for m in result["cells"][0]["metrics"] if m["name"] == "our_questions_acc"}
    assert evaluated == {"original", "unlearned"} and not result["failed"]
