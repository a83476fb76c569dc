"""Measure what retain rows improve when they are available: mixed batches, and statistics collected again per epoch.

    python recipes/experiments/retain_data.py images recipes/default/digits_rows.yaml --seeds 0,1,2

The first two arguments and further options are those of `hf-unlearn benchmark`. Each line of the table is the default
with one change. All lines start from the same models and stop at the same target:

- `no retain row`: the default;
- `collected again`: statistics of the retain rows are collected again on the current weights after every epoch;
- `mixed batches`: each batch has as many retain rows as forget rows, and their loss (`alpha` 1) is added;
- `both`; and `mixed batches alone`, without a constraint.

Numbers are means over seeds, with the range in brackets.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import TrainerCallback

from hf_unlearn import (
    DeletionRequest,
    RetainStatistics,
    UnlearningConfig,
    UnlearningError,
    UnlearningReport,
    UnlearningTrainer,
    bind_constraints,
    collect_statistics,
    evaluate_unlearning,
)
from hf_unlearn.benchmark import BENCHMARKS, Benchmark, Cell, Column, grid_cells, results
from hf_unlearn.cli import benchmark as benchmark_command
from hf_unlearn.cli import parsers, setup
from hf_unlearn.core import text
from hf_unlearn.deletion import build_request

LINES = {  # mixed batches, statistics collected again, constraint
    "no retain row": (False, False, True),
    "collected again": (False, True, True),
    "mixed batches": (True, False, True),
    "both": (True, True, True),
    "mixed batches alone": (True, False, False),
}
MODELS = ("original", "retrained")


def main() -> int:
    return start(__doc__, compare)


def start(description: str | None, compare: Callable[[Benchmark, Sequence[str]], str]) -> int:
    """Print the table that `compare` makes of the benchmark and file on the command line; return the exit code."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark")
    parser.add_argument("file", help="settings file of the default cell")
    args, options = parser.parse_known_args()
    setup.hush()
    try:
        parsers.check_choice("benchmark", args.benchmark, list(BENCHMARKS))
        print(compare(BENCHMARKS[args.benchmark], [args.file, *options]))
    except UnlearningError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def default_cells(benchmark: Benchmark, options: Sequence[str]) -> list[Cell]:
    """Return the cell of the default for each seed."""
    flags = benchmark_command.parser()
    flags.set_defaults(**benchmark.defaults)
    return grid_cells(*parsers.parse(flags, options))


def compare(benchmark: Benchmark, options: Sequence[str]) -> str:
    """Return the table. Raises the errors of `hf-unlearn benchmark`."""
    groups: dict[str, list[tuple[UnlearningReport, str]]] = {}
    for cell in default_cells(benchmark, options):
        request = build_request(replace(cell.args, constraints=None, use_retain_rows=True), cell.config, fisher=False)
        for name, (mixed, again, constrained) in LINES.items():
            changes: dict[str, Any] = {} if constrained else {"constraint": "none", "constraint_settings": None}
            config = cell.config.but(**changes, loss_settings={"alpha": float(mixed)})
            change = partial(collect_again, request) if again else None
            report = unlearned(
                request, config, collected(request, config), request.rows.retain if mixed else None, change
            )
            for model in [m for m in MODELS if name == "no retain row" and m in report.models]:
                groups.setdefault(model, []).append((report, model))
            groups.setdefault(name, []).append((report, "unlearned"))
    columns = [column for column in benchmark.columns if results.values(next(iter(groups.values())), column)]
    head = ["", "constraint", *(column.title for column in columns), "steps", "unlearning, s"]
    return results.table([head, *(row(name, group, columns) for name, group in groups.items())])


def unlearned(
    request: DeletionRequest,
    config: UnlearningConfig,
    statistics: RetainStatistics,
    retain: Any = None,
    change: Callable[[UnlearningTrainer], None] | None = None,
) -> UnlearningReport:
    """Unlearn, evaluate, and restore the original weights; `change` is called with the trainer before training."""
    models, splits, options = request.models, request.rows.splits, request.evaluation
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = UnlearningTrainer(
            models.original,
            config.but(output_dir=scratch),
            splits["forget"],
            retain,
            statistics=statistics,
            holdout_dataset=splits.get("holdout"),
            data_collator=models.collator,
            processing_class=models.processing_class,
        )
        if change is not None:
            change(trainer)
        try:
            trainer.train()
            seconds = time.perf_counter() - start
            report = evaluate_unlearning(
                trainer.model,
                splits,
                original=trainer.original_model,
                retrained=models.retrained,
                metrics=options.metrics,
                processing_class=models.processing_class,
                collator=models.collator,
                batch_size=config.per_device_eval_batch_size,
                seed=config.seed,
                cache_dir=options.cache_dir,
            )
        finally:
            trainer.constrainer.restore()
    report.method |= {"constraint": config.constraint, "steps": trainer.state.global_step}
    report.timings["unlearn"] = seconds
    return report


def collected(request: DeletionRequest, config: UnlearningConfig, fisher: bool = False) -> RetainStatistics:
    """Collect statistics of the retain rows on the current weights."""
    return collect_statistics(
        request.models.original,
        request.rows.retain,
        collator=request.models.collator,
        fisher=fisher,
        progress=False,
        batch_size=config.per_device_eval_batch_size,
    )


def collect_again(request: DeletionRequest, trainer: UnlearningTrainer) -> None:
    trainer.add_callback(CollectAgain(request, trainer))


class CollectAgain(TrainerCallback):
    """Bind the constraint to new statistics after every epoch; only for constraints on steps, not on the total move."""

    def __init__(self, request: DeletionRequest, trainer: UnlearningTrainer):
        self.request, self.trainer = request, trainer

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        bound = bind_constraints(collected(self.request, args), args.build_constraint())
        for part in self.trainer.constrainer.weights:
            if part.bound is not None:
                part.bound = bound[part.owner]


def row(name: str, group: list[tuple[UnlearningReport, str]], columns: Sequence[Column]) -> list[str]:
    cells = [text.spread(results.values(group, column)) for column in columns]
    if name in MODELS:
        return [name, "", *cells, "", ""]
    steps = [float(report.method["steps"]) for report, _ in group]
    seconds = [report.timings["unlearn"] for report, _ in group]
    return [name, group[0][0].method["constraint"], *cells, text.spread(steps, 0), text.spread(seconds, 1)]


if __name__ == "__main__":
    sys.exit(main())
