"""Benchmarks by name: data, models, settings and metrics of each, which a YAML file or flags override.

`catalogue/` has the benchmarks, `grid.py` runs a grid of methods, constraints and seeds on one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from hf_unlearn.core.registry import Registry


@dataclass(frozen=True)
class Column:
    """One number of the table; small values are written as powers of ten.

    >>> Column("forget quality", "forget_quality", "forget").title
    'forget quality'

    Attributes:
        title: Short title.
        metric: Name of the metric.
        split: Rows that it is measured on.
    """

    title: str
    metric: str
    split: str


@dataclass(frozen=True)
class Published:
    """Numbers that others published.

    Attributes:
        about: Model and data, in words.
        source: Where the numbers are from.
        columns: Titles of the benchmark's columns.
        rows: By method, the numbers in the order of `columns`.
    """

    about: str
    source: str
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Benchmark:
    """What is compared, and how.

    >>> accuracy = Column("forgotten", "accuracy", "forget")
    >>> Benchmark("accuracy on forget rows", {"methods": "npo,rmu"}, (accuracy,), ()).columns[0].metric
    'accuracy'

    Attributes:
        about: One line.
        defaults: Settings of `BenchmarkArguments` and `UnlearningConfig`.
        columns: The table.
        frontiers: Panels of the plot: titles of the columns on the horizontal axis (utility) and on the vertical axis
            (forgetting).
        published: Numbers to compare with.
    """

    about: str
    defaults: Mapping[str, object]
    columns: tuple[Column, ...]
    frontiers: tuple[tuple[str, str], ...] = ()
    published: tuple[Published, ...] = ()


BENCHMARKS: Registry[Benchmark] = Registry("benchmark", "hf_unlearn.benchmark.catalogue")


def register_benchmark(name: str, benchmark: Benchmark) -> None:
    """Make a benchmark available as `hf-unlearn benchmark NAME`.

    Any loss, constraint, metric and attack that is registered can be named in its defaults and columns.

    >>> from hf_unlearn.benchmark import BENCHMARKS, Benchmark, Column, register_benchmark
    >>> register_benchmark(
    ...     "two_seeds",
    ...     Benchmark(
    ...         about="accuracy on forget and retain rows",
    ...         defaults={"methods": "npo,rmu", "constraints": "none,energy", "seeds": "0,1"},
    ...         columns=(Column("forgotten", "accuracy", "forget"), Column("kept", "accuracy", "retain")),
    ...         frontiers=(("kept", "forgotten"),),
    ...     ),
    ... )
    >>> BENCHMARKS.find("two_seeds").defaults["methods"]
    'npo,rmu'
    >>> BENCHMARKS.remove("two_seeds")

    Raises:
        SettingsError: Another benchmark has this name.
    """
    BENCHMARKS.add(name, benchmark)
