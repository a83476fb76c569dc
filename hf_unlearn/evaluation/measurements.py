"""Measurements: columns of numbers, one entry per row, that a model gives on one split.

Metrics are computed from these columns and from nothing else. A measurement is taken once per model and split. With a
cache folder it is stored under a hash of the weights, the rows and its name; the files are safetensors and are written
atomically.
"""

import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import nn

from hf_unlearn.core.files import replace_file
from hf_unlearn.core.processes import gather, is_main, wait_for_all
from hf_unlearn.core.registry import Registry
from hf_unlearn.core.sharding import is_sharded
from hf_unlearn.data.batches import default_collator, with_content_mask
from hf_unlearn.data.formats import PHRASES, SECRET, Row, Rows
from hf_unlearn.data.row_identity import labelled_row_hash
from hf_unlearn.data.wrong_answers import ALTERNATIVES
from hf_unlearn.errors import DataError
from hf_unlearn.evaluation.content import score_content
from hf_unlearn.evaluation.generation import generate_answers, require_tokenizer, rouge_l, true_answers
from hf_unlearn.evaluation.gradient_norms import gradient_norms
from hf_unlearn.evaluation.greedy import greedy_reveals
from hf_unlearn.evaluation.row_scores import score_classes, score_rows
from hf_unlearn.models.fingerprint import model_fingerprint
from hf_unlearn.models.tasks import CONTENT_MASK, Collator, ProcessingClass

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Columns = Mapping[str, NDArray]
VERSION = 1  # of the meaning of the columns; a cached file of another version is not read
STOPS = ("\n\n", "\nQuestion", "Question:")  # MUSE cuts an answer at these


@dataclass(frozen=True)
class MeasurementTools:
    """How rows are measured; the same for every model and split of an evaluation.

    Attributes:
        collator: Makes batches of encoded rows.
        tokenizer: Decodes generated and true answers; needed for measurements of texts only.
        batch_size: Rows per forward pass.
        cache: Folder that keeps measured columns, or None.
    """

    collator: Collator
    tokenizer: "PreTrainedTokenizerBase | None" = None
    batch_size: int = 16
    cache: Path | None = None

    @classmethod
    def build(
        cls,
        processing_class: "ProcessingClass | None",
        collator: Collator | None = None,
        batch_size: int = 16,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> "MeasurementTools":
        """Make the tools from the keywords of `evaluate_unlearning` and `audit`; the default collator pads."""
        cache = None if cache_dir is None else Path(cache_dir)
        collator = with_content_mask(collator or default_collator(processing_class))
        return cls(collator, processing_class, batch_size, cache)


MeasurementFunction = Callable[[nn.Module, Rows, MeasurementTools], Columns]


@dataclass(frozen=True)
class Measurement:
    """One entry of `MEASUREMENTS`; see `register_measurement`."""

    function: MeasurementFunction
    reads_wrong_answers: bool = False
    reads_content: bool = False
    includes: tuple[str, ...] = ()


MEASUREMENTS: Registry[Measurement] = Registry("measurement")


def register_measurement(
    name: str, *, reads_wrong_answers: bool = False, reads_content: bool = False, includes: tuple[str, ...] = ()
) -> Callable[[MeasurementFunction], MeasurementFunction]:
    """Function decorator: make a measurement available to metrics, which name it in `UnlearningMetric.needs`.

    The function takes a model, the encoded rows of one split and the `MeasurementTools`, and returns columns by name,
    each with one entry per row. Example, the number of labels of each row:

    >>> import numpy as np
    >>> from hf_unlearn.evaluation import MEASUREMENTS, register_measurement
    >>> @register_measurement("label_counts")
    ... def label_counts(model, rows, tools):
    ...     return {"label_count": np.array([sum(label != -100 for label in row["labels"]) for row in rows])}
    >>> MEASUREMENTS["label_counts"].function(None, [{"labels": [-100, 5, 7]}], None)
    {'label_count': array([2])}
    >>> MEASUREMENTS.remove("label_counts")

    Args:
        name: Name of the measurement.
        reads_wrong_answers: Whether it reads the wrong answers of each row, so that the rows must have some.
        reads_content: Whether it reads the `content_mask` of each row, so that it is taken of splits that have them.
        includes: Names of measurements whose columns it returns as well; they are not taken a second time.

    Raises:
        SettingsError: Another measurement has this name.
    """

    def register(function: MeasurementFunction) -> MeasurementFunction:
        MEASUREMENTS.add(name, Measurement(function, reads_wrong_answers, reads_content, includes))
        return function

    return register


@register_measurement("rows")
def _row_scores(model: nn.Module, rows: Rows, tools: MeasurementTools) -> Columns:
    return vars(score_rows(model, rows, tools.collator, tools.batch_size))


@register_measurement("classes", includes=("rows",))
def _class_probabilities(model: nn.Module, rows: Rows, tools: MeasurementTools) -> Columns:
    scores, probabilities_NC = score_classes(model, rows, tools.collator, tools.batch_size)
    return {**vars(scores), "probabilities": probabilities_NC}


@register_measurement("alternatives", reads_wrong_answers=True)
def _other_answers(model: nn.Module, rows: Rows, tools: MeasurementTools) -> Columns:
    """Return the losses of each row's paraphrase and wrong answers.

    The answer itself stands in for a missing paraphrase (real authors, world facts). `wrong_loss` holds the wrong
    answers of all rows one after the other, `wrong_count` of them per row.
    """
    alternatives = [_alternatives_of(rows[i], i) for i in range(len(rows))]
    paraphrases = [others.get("paraphrase", rows[i]) for i, others in enumerate(alternatives)]
    wrong = [answer for others in alternatives for answer in others["wrong"]]
    paraphrase_loss, wrong_loss = (
        score_rows(model, [_without_alternatives(row) for row in answers], tools.collator, tools.batch_size).loss
        for answers in (paraphrases, wrong)
    )
    counts = np.array([len(others["wrong"]) for others in alternatives])
    return {"paraphrase_loss": paraphrase_loss, "wrong_loss": wrong_loss, "wrong_count": counts}


def _alternatives_of(row: Row, index: int) -> Mapping[str, Any]:
    alternatives = row.get(ALTERNATIVES)
    if not alternatives:
        raise DataError(
            f"row {index} has no wrong answers; the rows need a column 'perturbed_answer', as TOFU's *_perturbed splits"
        )
    return alternatives


def _without_alternatives(row: Row) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != ALTERNATIVES}


def wrong_losses(columns: Columns) -> list[NDArray]:
    """Split the column `wrong_loss` into the losses of each row's wrong answers."""
    return np.split(columns["wrong_loss"], np.cumsum(columns["wrong_count"])[:-1].astype(int))


@register_measurement("answers")
def _answers(model: nn.Module, rows: Rows, tools: MeasurementTools) -> Columns:
    """TOFU: ROUGE-L recall of up to 200 generated tokens."""
    return _rouge(model, rows, tools, new_tokens=200, measure="recall", stemmer=True)


@register_measurement("continuations")
def _continuations(model: nn.Module, rows: Rows, tools: MeasurementTools) -> Columns:
    """MUSE's verbatim memorisation: ROUGE-L F1 against the first 128 true tokens."""
    return _rouge(model, rows, tools, new_tokens=128, measure="fmeasure", true_tokens=128)


@register_measurement("short_answers")
def _short_answers(model: nn.Module, rows: Rows, tools: MeasurementTools) -> Columns:
    """MUSE's knowledge memorisation: ROUGE-L F1 of up to 32 generated tokens, cut where the next question starts."""
    return _rouge(model, rows, tools, new_tokens=32, measure="fmeasure", stops=STOPS)


def _rouge(
    model: nn.Module,
    rows: Rows,
    tools: MeasurementTools,
    *,
    new_tokens: int,
    measure: str,
    stemmer: bool = False,
    stops: tuple[str, ...] = (),
    true_tokens: int | None = None,
) -> Columns:
    """Return the ROUGE-L of generated answers against the true ones, or against their first `true_tokens` tokens."""
    answers = generate_answers(model, rows, tools.tokenizer, new_tokens, tools.batch_size)
    for stop in stops:
        answers = [text.split(stop)[0] for text in answers]
    true = true_answers(rows, tools.tokenizer, true_tokens)
    return {f"rouge_l_{measure}_{new_tokens}": rouge_l(answers, true, measure, stemmer)}


@register_measurement("gradients")
def _gradient_norms(model: nn.Module, rows: Rows, tools: MeasurementTools) -> Columns:
    return {"gradient_norm": gradient_norms(model, rows, tools.collator)}


@register_measurement("content", reads_content=True)
def _content(model: nn.Module, rows: Rows, tools: MeasurementTools) -> Columns:
    return vars(score_content(model, rows, tools.collator, tools.batch_size))


@register_measurement("greedy", reads_content=True)
def _greedy(model: nn.Module, rows: Rows, tools: MeasurementTools) -> Columns:
    """Return whether greedy answers give content away, NaN for rows that are not asked."""
    return {"reveals": greedy_reveals(model, rows, require_tokenizer(tools.tokenizer), tools.batch_size)}


@register_measurement("texts")
def _compressed_lengths(model: nn.Module, rows: Rows, tools: MeasurementTools) -> Columns:
    return {"compressed": compressed_lengths(true_answers(rows, tools.tokenizer))}


def compressed_lengths(texts: Sequence[str]) -> NDArray:
    """Return the number of bytes of each text after zlib compression: `[N]`."""
    return np.array([len(zlib.compress(text.encode("utf-8"))) for text in texts], dtype=np.float64)


def measure_splits(
    model: nn.Module, splits: Mapping[str, Rows], wanted: Mapping[str, Iterable[str]], tools: MeasurementTools
) -> dict[str, dict[str, NDArray]]:
    """Take the wanted measurements of each split under one model.

    Args:
        model: The model. Nothing is cached for a sharded one: its weights are not all on this process to be hashed.
        splits: Encoded rows by split.
        wanted: Names of measurements by split.
        tools: How rows are measured.

    Returns:
        Columns by split.
    """
    model_key = "" if tools.cache is None or is_sharded(model) else model_fingerprint(model)
    return {split: measure(wanted[split], model, rows, tools, model_key) for split, rows in splits.items()}


def measure(
    names: Iterable[str], model: nn.Module, rows: Rows, tools: MeasurementTools, model_key: str = ""
) -> dict[str, NDArray]:
    """Take several measurements of one split under one model and merge their columns.

    Args:
        names: Names of `MEASUREMENTS`.
        model: The model.
        rows: Encoded rows of the split.
        tools: How rows are measured.
        model_key: `model_fingerprint(model)`, computed once for all splits; empty: do not read or write the cache.

    Raises:
        SettingsError: There is no measurement of a name.
    """
    measurements = {name: MEASUREMENTS.find(name) for name in sorted(set(names))}
    included = {name for measurement in measurements.values() for name in measurement.includes}
    columns: dict[str, NDArray] = {}
    for name, measurement in measurements.items():
        if name not in included:
            columns.update(_cached(name, measurement, model, rows, tools, model_key))
    return columns


def _cached(
    name: str, measurement: Measurement, model: nn.Module, rows: Rows, tools: MeasurementTools, model_key: str
) -> Columns:
    """Read the columns from the cache, or take the measurement and write them there.

    Either all processes read the file or none does, because a measurement is taken by all of them together.
    """
    if tools.cache is None or not model_key:
        return measurement.function(model, rows, tools)
    path = tools.cache / f"measure-{_key(name, measurement, model_key, rows)}.safetensors"
    if all(gather(path.is_file())):
        return load_file(path)
    columns = measurement.function(model, rows, tools)
    if is_main():
        path.parent.mkdir(parents=True, exist_ok=True)
        with replace_file(path) as beside:
            save_file({name: np.ascontiguousarray(column) for name, column in columns.items()}, beside)
    wait_for_all()
    return columns


def _key(name: str, measurement: Measurement, model_key: str, rows: Rows) -> str:
    digest = sha256(f"{VERSION} {name} {model_key}".encode())
    for index in range(len(rows)):
        for row in _with_alternatives(rows[index]) if measurement.reads_wrong_answers else [rows[index]]:
            digest.update(labelled_row_hash(row))
        if measurement.reads_content:
            digest.update(
                repr([list(rows[index][CONTENT_MASK]), rows[index].get(SECRET), rows[index].get(PHRASES)]).encode()
            )
    return digest.hexdigest()[:32]


def _with_alternatives(row: Row) -> Sequence[Row]:
    alternatives = row.get(ALTERNATIVES) or {}
    return [row, alternatives.get("paraphrase", row), *alternatives.get("wrong", ())]
