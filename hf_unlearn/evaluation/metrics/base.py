"""`UnlearningMetric`: what a metric measures, and how its value is computed."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_unlearn.core.text import ShortRepr
from hf_unlearn.evaluation.measurements import Columns
from hf_unlearn.evaluation.metrics.intervals import Estimate, Undefined

if TYPE_CHECKING:
    from datasets.features.features import FeatureType

NUMBER, TEXT = datasets.Value("float64"), datasets.Value("string")
NUMBERS = datasets.Sequence(NUMBER)

RETRAINED, TEACHER = "retrained", "teacher"
EACH_SPLIT = "*"
TEST = "test|holdout"  # the rows that no model was trained on
ROWS = ("rows",)  # the measurement of `RowScores`


@dataclass(frozen=True, repr=False)
class MeasuredColumns(ShortRepr):
    """What metrics are computed from.

    Attributes:
        columns: Measured columns by model (`original`, `unlearned`, `retrained`, `teacher`) and split.
        seed: Seed of the bootstrap.
    """

    columns: Mapping[str, Mapping[str, Columns]]
    seed: int = 0

    def of(self, model: str, split: str) -> Columns:
        """Return the columns of a model on a split; `a|b` means the first of these splits that was measured."""
        name = first_present(split, self.columns[model])
        if name is None:
            raise KeyError(f"no split {split!r} was measured, only {', '.join(self.columns[model])}")
        return self.columns[model][name]

    @property
    def has_retrained(self) -> bool:
        """Whether a retrained model was measured."""
        return RETRAINED in self.columns


def first_present(split: str, splits: Mapping[str, object]) -> str | None:
    """Return the first of the split names `a|b` that is a key of `splits`, or None."""
    return next((name for name in split.split("|") if name in splits), None)


class UnlearningMetric(evaluate.Metric):
    """A metric of unlearning, registered by `register_metric`.

    A subclass declares what it reads and gives `estimate`. It can then be used in three ways:

    - by its registered name in `evaluate_unlearning`, which takes the measurements that it `needs` and calls
      `from_columns`;
    - as any `evaluate.Metric`: feed rows with `add_batch` on one or several processes, then call `compute` on the
      first. `compute` returns `{name: value, "low": ..., "high": ..., "n": ...}`, and `"reason"` where the value is
      undefined (NaN). With several processes give all of them the same `experiment_id` and a shared `cache_dir`;
    - by calling `estimate` on arrays.

    Nothing is downloaded.

    >>> import numpy as np
    >>> from hf_unlearn.evaluation.metrics.intervals import bootstrap_mean
    >>> class CertainRows(UnlearningMetric):
    ...     '''Share of the rows whose loss is below a tenth of a nat.'''
    ...     inputs = {"loss": NUMBER}
    ...     @staticmethod
    ...     def estimate(loss, seed=0):
    ...         return bootstrap_mean(np.asarray(loss) < 0.1, seed)
    >>> CertainRows.estimate([0.05, 2.0]).value
    0.5

    Attributes:
        inputs: Columns of `add_batch`, which are also the arguments of `estimate`: `NUMBER`, `NUMBERS` or `TEXT`.
        needs: Names of the measurements to take, by split. `*` means each split on its own; `a|b` means the first of
            these splits that is given. The value is reported under the first split.
        against_retrained: Whether it compares with the retrained model. It is undefined without one, and is not
            reported for the retrained model itself.
        needs_teacher: Whether it compares with a randomly initialised model, the teacher.
    """

    inputs: ClassVar[Mapping[str, "FeatureType"]]
    needs: ClassVar[Mapping[str, tuple[str, ...]]] = {EACH_SPLIT: ROWS}
    against_retrained: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = False

    @staticmethod
    def estimate(*columns: Any, **options: Any) -> Estimate:
        """Compute the value from complete columns.

        A subclass names its `inputs` as arguments, followed by `seed` (of the bootstrap) and options of its own.
        """
        raise NotImplementedError

    @classmethod
    def from_columns(cls, measured: MeasuredColumns, model: str, split: str) -> Estimate:
        """Compute the value of one model on one split from measured columns.

        Each input is the measured column of the same name. An input `retrained_x` or `teacher_x` is the column `x`
        of that model, None if it was not measured. Metrics that read several splits, or derive their inputs,
        override this.
        """
        inputs = {name: _input_column(name, measured, model, split) for name in cls.inputs}
        return cls.estimate(**inputs, seed=measured.seed)

    def _info(self) -> evaluate.MetricInfo:
        description = inspect.getdoc(type(self)) or ""
        columns = "\n".join(f"    {name}: {feature}" for name, feature in self.inputs.items())
        return evaluate.MetricInfo(
            description=description,
            citation="",
            inputs_description=f"\n{description}\n\nColumns:\n{columns}\n",
            features=datasets.Features(dict(self.inputs)),
        )

    def _compute(self, **columns: ArrayLike) -> dict[str, float | str | None]:
        arrays = {name: _array(value, self.inputs.get(name)) for name, value in columns.items()}
        estimate = self.estimate(**arrays)
        result = {self.name: estimate.value, "low": estimate.low, "high": estimate.high, "n": estimate.n}
        return result | ({"reason": estimate.reason} if isinstance(estimate, Undefined) else {})


def grouped_columns(groups: Mapping[str, NDArray]) -> tuple[list[str], NDArray]:
    """Return the columns `group` and `score` of rows whose scores are given by group.

    >>> grouped_columns({"forget": np.array([1.0]), "test": np.array([0.0, 1.0])})
    (['forget', 'test', 'test'], array([1., 0., 1.]))
    """
    return [name for name, rows in groups.items() for _ in rows], np.concatenate(list(groups.values()))


def _input_column(name: str, measured: MeasuredColumns, model: str, split: str) -> NDArray | None:
    for other in (RETRAINED, TEACHER):
        if name.startswith(f"{other}_"):
            return measured.of(other, split)[name.removeprefix(f"{other}_")] if other in measured.columns else None
    return measured.of(model, split)[name]


def _array(value: ArrayLike, feature: "FeatureType | None") -> ArrayLike:
    """Convert a column of numbers to float64; lists of numbers, texts and options of `compute` stay as they are."""
    return np.asarray(value, dtype=np.float64) if feature is NUMBER else value
