"""Finished output folders to publish."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.hub_client import Client
from helpers.tiny import collate, text_rows, tiny_gpt2
from hf_unlearn.evaluation.report import MetricValue, UnlearningReport
from hf_unlearn.publishing.model_folder import complete_folder

ROWS = text_rows(3)
PUSH = """
from hf_unlearn import push_unlearned_model
result = push_unlearned_model(folder, folder, repo, **options).oid
"""


def report(**changes: Any) -> UnlearningReport:
    metrics = [
        MetricValue("accuracy", value, "forget", model, 20, value - 0.05, value + 0.05)
        for model, value in (("original", 0.98), ("unlearned", 0.05))
    ]
    request = {"rows": 2, "source": "invented", "date": "2025-05-01", "commitment": "ab12"}
    return UnlearningReport(
        metrics=metrics, request=request, method={"loss": "ce_u", "constraint": "energy"}, **changes
    )


def finished(folder: Path, model: Any = None, **options: Any) -> Path:
    """A folder to publish: the model with report, card and plots."""
    (model or tiny_gpt2()).save_pretrained(folder, **options)
    complete_folder(folder, report(), "model")
    return folder


IDS = collate(ROWS)["input_ids"].tolist()


def push(client: Client, folder: Path, repo: str = "me/model", **options: Any) -> str:
    return client.run(PUSH, folder=str(folder), repo=repo, options=options)
