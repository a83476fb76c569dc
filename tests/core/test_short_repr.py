"""Law: `print` of any object of the package fits in a screen: shapes and counts in place of tensors and rows."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch

import hf_unlearn
from helpers.tiny import tiny_llama
from hf_unlearn.constraints import StepConstrainer, bind_constraints
from hf_unlearn.constraints.registry import build_constraint
from hf_unlearn.core.text import ShortRepr
from hf_unlearn.data.batches import PaddingCollator
from hf_unlearn.deletion.request import DeletionRequest, RequestModels, RequestRows
from hf_unlearn.evaluation.report import UnlearningReport
from hf_unlearn.evaluation.row_scores import score_rows
from hf_unlearn.models.forward import predict
from hf_unlearn.statistics.collect import collect_statistics

LONGEST = 800
LARGE = re.compile(r"\b(Tensor|ndarray|Module|Rows|Predictions|EncodedSplits)\b")


def classes() -> Iterator[type]:
    for module in pkgutil.walk_packages(hf_unlearn.__path__, "hf_unlearn."):
        if module.name != "hf_unlearn.__main__":
            for value in vars(importlib.import_module(module.name)).values():
                if inspect.isclass(value) and value.__module__ == module.name:
                    yield value


def test_classes_that_hold_tensors_rows_or_models_have_a_short_repr() -> None:
    large = [
        kind
        for kind in classes()
        if is_dataclass(kind)
        and any(f.repr and "Callable" not in str(f.type) and LARGE.search(str(f.type)) for f in fields(kind))
    ]
    assert len(large) > 15
    assert not [kind for kind in large if hasattr(kind.__repr__, "__wrapped__")]  # what `dataclass` generates


def test_objects_of_a_run_are_short() -> None:
    model = tiny_llama()
    rows = [{"input_ids": [i % 29, i % 7 + 1, 5], "labels": [-100, i % 7 + 1, 5]} for i in range(200)]
    statistics = collect_statistics(model, rows, fisher=True, progress=False)
    constraint = build_constraint("kronecker", {})
    request = DeletionRequest(
        models=RequestModels(original=model, retrained=model),
        rows=RequestRows(forget=rows, evaluation={"retain": rows}),
        statistics=statistics,
    )
    scores = score_rows(model, rows, PaddingCollator())
    batch = PaddingCollator()(rows)
    objects: list[Any] = [
        statistics,
        statistics.gram_eigen(next(iter(statistics.layers))).blocks()[0],
        *bind_constraints(statistics, constraint, torch.device("cpu")).values(),
        StepConstrainer(model, statistics, constraint),
        request,
        scores,
        predict(model, batch),
        UnlearningReport(history=[{"loss": 1.0}] * 1000),
    ]
    long = {type(value).__name__: len(repr(value)) for value in objects if len(repr(value)) > LONGEST}
    assert not long
    assert f"{len(rows)}" in repr(request.rows) and "float" in repr(scores)


def test_control_without_the_base_class_it_is_long() -> None:
    @dataclass
    class Plain:
        values: np.ndarray

    @dataclass(repr=False)
    class Short(ShortRepr):
        values: np.ndarray

    values = np.random.default_rng(0).normal(size=(40, 40))
    assert len(repr(Plain(values))) > 200 > len(repr(Short(values)))
