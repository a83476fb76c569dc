"""`UnlearningMetric`: an `evaluate.Metric` whose numbers come with their interval and n, and that needs no download."""

import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import datasets
import evaluate
import numpy as np

from hf_unlearn.evaluation.metrics.intervals import Estimate, Undefined

NUMBER, TEXT = datasets.Value("float64"), datasets.Value("string")
NUMBERS = datasets.Sequence(NUMBER)


class UnlearningMetric(evaluate.Metric):
    """Feed rows with `add_batch`, on as many processes as given to the constructor, and `compute` on the first.

    A subclass names its columns in `inputs` and gives `estimate(**columns, seed, **options)`, which may also be called
    directly on arrays. `compute` returns `{name: value, "low": ..., "high": ..., "n": ...}`, and `"reason"` where the
    value is undefined (NaN). With several processes give all of them the same `experiment_id` and a `cache_dir` that
    they share, as for any `evaluate.Metric`.
    """

    inputs: ClassVar[Mapping[str, Any]]

    @staticmethod
    def estimate(*args: Any, **options: Any) -> Estimate:
        """The number, from whole columns."""
        raise NotImplementedError

    def _info(self) -> evaluate.MetricInfo:
        described = inspect.getdoc(type(self)) or ""
        columns = "\n".join(f"    {name}: {feature}" for name, feature in self.inputs.items())
        return evaluate.MetricInfo(
            description=described,
            citation="",
            inputs_description=f"\n{described}\n\nColumns:\n{columns}\n",
            features=datasets.Features(dict(self.inputs)),
        )

    def _compute(self, **columns: Any) -> dict[str, Any]:
        arrays = {name: _array(value, self.inputs.get(name)) for name, value in columns.items()}
        found = self.estimate(**arrays)
        result = {self.name: found.value, "low": found.low, "high": found.high, "n": found.n}
        return result | ({"reason": found.reason} if isinstance(found, Undefined) else {})


def _array(value: Any, feature: Any) -> Any:
    """A column of numbers as float64; lists of numbers and texts, and options of `compute`, as they are."""
    return np.asarray(value, dtype=np.float64) if feature is NUMBER else value
