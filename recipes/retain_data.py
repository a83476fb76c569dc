"""What retain rows buy, where there are some: mixed batches, and statistics that are collected again on the way.

    python recipes/retain_data.py images recipes/default/digits_rows.yaml --seeds 0,1,2

The first two arguments, and further options, are those of `hf-unlearn benchmark`. Each line is the default with one
thing changed, from the same models; all stop at the same mark:

- `no retain row`: the default;
- `collected again`: statistics of the retain rows are collected afresh on the weights of the moment, at every epoch;
- `mixed batches`: as many retain rows as forget rows in each batch, and their loss (`alpha` 1) beside the forget loss;
- `both`; and `mixed batches alone`, without a constraint.

A line's numbers are means over seeds, with the range in brackets.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from transformers import PrinterCallback, TrainerCallback

from hf_unlearn.benchmark import results
from hf_unlearn.benchmark.cell import Cell
from hf_unlearn.benchmark.grid import grid_cells
from hf_unlearn.benchmark.registry import BENCHMARKS, Benchmark, Column
from hf_unlearn.cli.benchmark import parser as benchmark_parser
from hf_unlearn.cli.parsers import check_choice, parse
from hf_unlearn.cli.setup import hush
from hf_unlearn.constraints.binding import bind_constraints
from hf_unlearn.core.text import spread
from hf_unlearn.deletion.build import build_request
from hf_unlearn.deletion.request import DeletionRequest
from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.evaluate import evaluate_unlearning
from hf_unlearn.evaluation.report import UnlearningReport
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.statistics.retain_statistics import RetainStatistics
from hf_unlearn.trainer.config import UnlearningConfig
from hf_unlearn.trainer.trainer import UnlearningTrainer

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


def start(about: str | None, compare: Callable[[Benchmark, Sequence[str]], str]) -> int:
    """A script that prints the table of a benchmark and a file; returns the exit code."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark")
    parser.add_argument("file", help="settings of the default's cell")
    args, options = parser.parse_known_args()
    hush()
    try:
        check_choice("benchmark", args.benchmark, list(BENCHMARKS))
        print(compare(BENCHMARKS[args.benchmark], [args.file, *options]))
    except UnlearningError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def default_cells(benchmark: Benchmark, options: Sequence[str]) -> list[Cell]:
    """The default's cell of each seed."""
    made = benchmark_parser()
    made.set_defaults(**benchmark.defaults)
    return grid_cells(*parse(made, options))


def compare(benchmark: Benchmark, options: Sequence[str]) -> str:
    """The table; raises what `hf-unlearn benchmark` does."""
    found: dict[str, list[tuple[UnlearningReport, str]]] = {}
    for cell in default_cells(benchmark, options):
        request = build_request(replace(cell.args, constraints=None, use_retain_rows=True), cell.config, fisher=False)
        for name, (mixed, again, constrained) in LINES.items():
            changes: dict[str, Any] = {} if constrained else {"constraint": "none", "constraint_settings": None}
            own = cell.config.but(**changes, loss_settings={"alpha": float(mixed)})
            change = partial(collect_again, request) if again else None
            report = unlearned(request, own, collected(request, own), request.rows.retain if mixed else None, change)
            for model in [m for m in MODELS if name == "no retain row" and m in report.models]:
                found.setdefault(model, []).append((report, model))
            found.setdefault(name, []).append((report, "unlearned"))
    columns = [column for column in benchmark.columns if results.values(next(iter(found.values())), column)]
    head = ["", "constraint", *(column.title for column in columns), "steps", "unlearning, s"]
    return results.table([head, *(row(name, group, columns) for name, group in found.items())])


def unlearned(
    request: DeletionRequest,
    config: UnlearningConfig,
    statistics: RetainStatistics,
    retain: Any = None,
    change: Callable[[UnlearningTrainer], None] | None = None,
) -> UnlearningReport:
    """Unlearn, judge, and put the original weights back; `change` is called with the trainer before."""
    models, splits, options = request.models, request.rows.splits, request.evaluation
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = UnlearningTrainer(
            models.original, config.but(output_dir=scratch), splits["forget"], retain, statistics=statistics,
            holdout_dataset=splits.get("holdout"),
            data_collator=models.collator, processing_class=models.processing_class,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        if change is not None:
            change(trainer)
        try:
            trainer.train()
            seconds = time.perf_counter() - start
            report = evaluate_unlearning(
                trainer.model, splits, original=trainer.original_model, retrained=models.retrained,
                metrics=options.metrics, processing_class=models.processing_class, collator=models.collator,
                batch_size=config.per_device_eval_batch_size, seed=config.seed, cache_dir=options.cache_dir,
            )  # fmt: skip
        finally:
            trainer.constrainer.restore()
    report.method |= {"constraint": config.constraint, "steps": trainer.state.global_step}
    report.timings["unlearn"] = seconds
    return report


def collected(request: DeletionRequest, config: UnlearningConfig, fisher: bool = False) -> RetainStatistics:
    """Statistics of the retain rows on the weights of the moment."""
    return collect_statistics(
        request.models.original, request.rows.retain, collator=request.models.collator, fisher=fisher, progress=False,
        batch_size=config.per_device_eval_batch_size,
    )  # fmt: skip


def collect_again(request: DeletionRequest, trainer: UnlearningTrainer) -> None:
    trainer.add_callback(CollectAgain(request, trainer))


class CollectAgain(TrainerCallback):
    """Binds the constraint to new statistics at the end of every epoch; for constraints on steps, not on the move."""

    def __init__(self, request: DeletionRequest, trainer: UnlearningTrainer):
        self.request, self.trainer = request, trainer

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        bound = bind_constraints(collected(self.request, args), args.build_constraint())
        for part in self.trainer.constrainer.weights:
            if part.bound is not None:
                part.bound = bound[part.owner]


def row(name: str, group: list[tuple[UnlearningReport, str]], columns: Sequence[Column]) -> list[str]:
    cells = [spread(results.values(group, column)) for column in columns]
    if name in MODELS:
        return [name, "", *cells, "", ""]
    steps = [float(report.method["steps"]) for report, _ in group]
    seconds = [report.timings["unlearn"] for report, _ in group]
    return [name, group[0][0].method["constraint"], *cells, spread(steps, 0), spread(seconds, 1)]


if __name__ == "__main__":
    sys.exit(main())
