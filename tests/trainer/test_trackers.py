"""Trackers receive the curves of drift, leak, forget and retain rows from Trainer's callbacks: `report_to` is enough.

The event file is read record by record (TFRecord: length, checksum, bytes, checksum) and not with the library that
wrote it; a tracker that is a plain callback sees the same values.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainerCallback

from helpers.tiny import tiny_gpt2
from helpers.training import FORGET, HOLDOUT, RETAIN, settings
from hf_unlearn.trainer.trainer import UnlearningTrainer

CURVES = (
    "train/loss",
    "train/retain_drift",
    "train/retain_kl",
    "train/leak",
    "eval/forget_probability",
    "eval/retain_probability",
    "eval/retain_loss",
)


class Fake(TrainerCallback):
    """Records what a custom tracker sees."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        self.lines.append({"step": state.global_step, **(logs or {})})


def records(path: Path) -> Iterator[bytes]:
    content = path.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield content[12 : 12 + length]
        content = content[16 + length :]


def curves(folder: Path) -> dict[str, dict[int, float]]:
    """Return the values by tag and step, from all event files below `folder`."""
    event_pb2 = pytest.importorskip("tensorboardX.proto.event_pb2")
    values: dict[str, dict[int, float]] = defaultdict(dict)
    for path in folder.rglob("events.out.tfevents.*"):
        for record in records(path):
            event = event_pb2.Event.FromString(record)
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    values[value.tag][event.step] = value.simple_value
    return values


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, fake: Fake, **changes: Any) -> dict[str, dict[int, float]]:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "events"))
    args = settings(
        folder / "run",
        report_to="tensorboard",
        eval_strategy="steps",
        eval_steps=2,
        constraint="energy",
        constraint_settings={"energy": 0.9},
        **changes,
    )
    trainer = UnlearningTrainer(
        tiny_gpt2(),
        args,
        FORGET,
        RETAIN,
        holdout_dataset=HOLDOUT,
        eval_dataset={"retain": RETAIN},
        callbacks=[fake],
        statistics=_statistics(),
    )
    trainer.train()
    return curves(folder / "events")


def _statistics() -> Any:
    from hf_unlearn.statistics.collect import collect_statistics

    return collect_statistics(tiny_gpt2(), RETAIN, fisher=True, progress=False)


def test_every_curve_reaches_the_tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboardX")
    fake = Fake()
    tracked = run(tmp_path, monkeypatch, fake, forget_target=0.0)
    for name in CURVES:
        assert len(tracked[name]) >= 3, f"{name}: {tracked[name]}"
        logged = name.removeprefix("train/").replace("eval/", "eval_")
        seen = {line["step"]: line[logged] for line in fake.lines if logged in line}
        assert tracked[name] == pytest.approx(seen, rel=1e-5)
    drift = [tracked["train/retain_drift"][step] for step in sorted(tracked["train/retain_drift"])]
    assert drift == sorted(drift) and drift[-1] > 0
    probability = tracked["eval/forget_probability"]
    assert probability[max(probability)] < probability[min(probability)]


def test_trainers_own_log_has_no_drift(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: with Trainer's `log` the curves are missing."""
    pytest.importorskip("tensorboardX")
    monkeypatch.setattr(UnlearningTrainer, "log", Trainer.log)
    tracked = run(tmp_path, monkeypatch, Fake(), forget_target=0.0)
    assert tracked["train/loss"] and not {"train/retain_drift", "train/leak"} & set(tracked)
