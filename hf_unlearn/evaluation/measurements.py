"""What is measured on a model, split by split: columns of numbers with an entry for each row, computed once and cached.

Metrics (`judge`) are made of these columns alone. A cached column is found again by the hash of the weights, the rows
and the measure's settings; the files are safetensors, written whole or not at all.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import nn

from hf_unlearn.core.files import replace_file
from hf_unlearn.core.processes import gather, is_main, wait_for_all
from hf_unlearn.data.row_identity import labelled_row_hash
from hf_unlearn.data.wrong_answers import ALTERNATIVES
from hf_unlearn.errors import DataError
from hf_unlearn.evaluation.generation import generate_answers, true_answers
from hf_unlearn.evaluation.metrics.language import rouge_l
from hf_unlearn.evaluation.metrics.membership import compressed_lengths, gradient_norms
from hf_unlearn.evaluation.row_scores import score_classes, score_rows
from hf_unlearn.models.tasks import Collator

Columns = Mapping[str, NDArray]
VERSION = 1  # of the columns' meaning: a cached file of another is not found
STOPS = ("\n\n", "\nQuestion", "Question:")  # where MUSE cuts an answer


@dataclass(frozen=True)
class MeasurementTools:
    """What rows are measured with: `collator` pads them, `tokenizer` reads generated text."""

    collator: Collator
    tokenizer: Any = None
    batch_size: int = 16


def _rows(model: nn.Module, rows: Any, tools: MeasurementTools) -> Columns:
    return vars(score_rows(model, rows, tools.collator, tools.batch_size))


def _classes(model: nn.Module, rows: Any, tools: MeasurementTools) -> Columns:
    scores, probabilities_NC = score_classes(model, rows, tools.collator, tools.batch_size)
    return {**vars(scores), "probabilities": probabilities_NC}


def _alternatives(model: nn.Module, rows: Any, tools: MeasurementTools) -> Columns:
    """Losses of the paraphrase (of the answer itself where there is none: real authors, world facts) and wrong answers,
    the latter one row's after another's, `wrong_count` of them a row."""
    others = [_other_answers(rows[i], i) for i in range(len(rows))]
    paraphrases = [other.get("paraphrase", rows[i]) for i, other in enumerate(others)]
    wrong = [answer for other in others for answer in other["wrong"]]
    losses = [
        score_rows(model, [_plain(row) for row in part], tools.collator, tools.batch_size).loss
        for part in (paraphrases, wrong)
    ]
    counts = np.array([len(other["wrong"]) for other in others])
    return {"paraphrase_loss": losses[0], "wrong_loss": losses[1], "wrong_count": counts}


def _other_answers(row: Mapping[str, Any], index: int) -> Mapping[str, Any]:
    found = row.get(ALTERNATIVES)
    if not found:
        raise DataError(
            f"row {index} has no wrong answers; the rows need a column 'perturbed_answer', as TOFU's *_perturbed splits"
        )
    return found


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != ALTERNATIVES}


def wrong_losses(columns: Columns) -> list[NDArray]:
    """The losses of each row's wrong answers."""
    return np.split(columns["wrong_loss"], np.cumsum(columns["wrong_count"])[:-1].astype(int))


def _answers(
    new_tokens: int = 200, measure: str = "recall", stemmer: bool = True, stops: tuple[str, ...] = (), cut: bool = False
) -> Callable[[nn.Module, Any, MeasurementTools], Columns]:
    """ROUGE-L of generated answers; `cut` shortens the true ones to `new_tokens` too."""

    def scores(model: nn.Module, rows: Any, tools: MeasurementTools) -> Columns:
        found = generate_answers(model, rows, tools.tokenizer, new_tokens, tools.batch_size)
        for stop in stops:
            found = [text.split(stop)[0] for text in found]
        true = true_answers(rows, tools.tokenizer, new_tokens if cut else None)
        return {f"rouge_l_{measure}_{new_tokens}": rouge_l(found, true, measure, stemmer)}

    return scores


def _gradients(model: nn.Module, rows: Any, tools: MeasurementTools) -> Columns:
    return {"gradient_norm": gradient_norms(model, rows, tools.collator)}


def _texts(model: nn.Module, rows: Any, tools: MeasurementTools) -> Columns:
    """Compressed length of each row's answer, in bytes."""
    return {"compressed": compressed_lengths(true_answers(rows, tools.tokenizer))}


MEASURES: dict[str, Callable[[nn.Module, Any, MeasurementTools], Columns]] = {
    "rows": _rows,
    "classes": _classes,
    "alternatives": _alternatives,
    "answers": _answers(),
    "continuations": _answers(128, "fmeasure", stemmer=False, cut=True),
    "short_answers": _answers(32, "fmeasure", stemmer=False, stops=STOPS),
    "gradients": _gradients,
    "texts": _texts,
}


def measure(
    names: Iterable[str],
    model: nn.Module,
    rows: Any,
    tools: MeasurementTools,
    cache: Path | None = None,
    model_key: str = "",
) -> dict[str, NDArray]:
    """The columns of several `MEASURES` of one split under one model, from `cache` where they are there.

    `model_key` is `model_fingerprint(model)`, made once for all splits.
    """
    wanted = set(names)
    columns: dict[str, NDArray] = {}
    if "classes" in wanted:
        wanted.discard("rows")  # the same forward pass gives both
    for name in (name for name in MEASURES if name in wanted):
        if cache is None:
            columns.update(MEASURES[name](model, rows, tools))
        else:
            path = cache / f"measure-{_key(name, model_key, rows)}.safetensors"
            columns.update(_cached(path, lambda name=name: MEASURES[name](model, rows, tools)))  # type: ignore[misc]
    return columns


def _cached(path: Path, make: Callable[[], Columns]) -> Columns:
    """All processes read the file, or none does: what is made is made together."""
    if all(gather(path.is_file())):
        return load_file(path)
    columns = dict(make())
    if is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as beside:
            save_file({name: np.ascontiguousarray(column) for name, column in columns.items()}, beside)
    wait_for_all()
    return columns


def _key(name: str, model_key: str, rows: Any) -> str:
    digest = sha256(f"{VERSION} {name} {model_key}".encode())
    for index in range(len(rows)):
        for row in _with_alternatives(rows[index]) if name == "alternatives" else [rows[index]]:
            digest.update(labelled_row_hash(row))
    return digest.hexdigest()[:32]


def _with_alternatives(row: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    others = row.get(ALTERNATIVES) or {}
    return [row, others.get("paraphrase", row), *others.get("wrong", ())]
