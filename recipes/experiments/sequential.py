"""Compare a series of deletion requests on carried statistics with fresh statistics and with one joint request.

    python recipes/experiments/sequential.py digits --output_dir outputs/sequential/rows-0
    python recipes/experiments/sequential.py digits --forget classes --requests 5 \\
        --output_dir outputs/sequential/classes-0
    python recipes/experiments/sequential.py tofu --output_dir outputs/sequential/tofu
    python recipes/experiments/sequential.py table outputs/sequential/rows-*

Four arms start from one original model. Each request stops by the rule of the recipe:
  carried  the retain statistics of one request are the full statistics of the next (no retain row is read)
  again    as carried, and each request also trains on the rows of all earlier ones (`forget_again`)
  fresh    statistics are collected again on the last model before each request (all remaining rows are read)
  joint    one request for all rows
After each request all earlier forget sets are evaluated again. A run that was stopped resumes with the first incomplete
request. The script prints a Markdown table and draws `series.png`.
"""

import argparse
import secrets
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import ViTForImageClassification

from hf_unlearn import (
    DeletionRequest,
    Ledger,
    PaddingCollator,
    RequestModels,
    RequestRows,
    RequestSeries,
    UnlearningConfig,
    UnlearningError,
    UnlearningReport,
    collect_statistics,
    fulfil_request,
)
from hf_unlearn.cli import main as hf_unlearn
from hf_unlearn.cli import setup
from hf_unlearn.core import files
from hf_unlearn.deletion import read_key
from hf_unlearn.demo import digits as digits_demo
from hf_unlearn.evaluation import report as reporting
from hf_unlearn.evaluation import tables
from hf_unlearn.publishing import series_plot

Rows = digits_demo.Rows
ARMS = ("carried", "again", "fresh")
Arms = dict[str, list[UnlearningReport]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest="task", required=True)
    digits = tasks.add_parser("digits")
    digits.add_argument(
        "--forget", choices=("rows", "classes"), default="rows", help="14 single rows, or a class, each"
    )
    digits.add_argument("--constraint", help="default: the demonstration's, ridge for rows and kronecker for classes")
    digits.add_argument("--requests", type=int, default=10)
    digits.add_argument("--seed", type=int, default=0)
    tofu = tasks.add_parser("tofu")
    tofu.add_argument("--settings", default=str(Path(__file__).parents[1] / "tofu.yaml"))
    tofu.add_argument(
        "--requests", type=int, default=5, help="number of forgotten authors, of ten that the model is trained on"
    )
    for task in (digits, tofu):
        task.add_argument("--output_dir", type=Path, required=True)
    table = tasks.add_parser("table", help="Markdown table of finished runs, with mean and range over several")
    table.add_argument("folders", type=Path, nargs="+")
    table.add_argument("--metric", default="accuracy", help="accuracy, answer_probability, ...")
    args, flags = parser.parse_known_args()
    if flags and args.task != "tofu":
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    try:
        if args.task == "table":
            print(markdown([read(folder) for folder in args.folders], args.metric))
            return 0
        setup.hush(bars=args.task == "tofu")
        args.output_dir.mkdir(parents=True, exist_ok=True)
        run_digits(args) if args.task == "digits" else run_tofu(args, flags)
        arms, metric = read(args.output_dir), "accuracy" if args.task == "digits" else "answer_probability"
        series_plot.save_series_plot(arms, args.output_dir / "series.png", metric)
        print(markdown([arms], metric))
    except UnlearningError as error:
        print(f"sequential.py: {error}", file=sys.stderr)
        return 2
    return 0


def folder_of(out: Path, arm: str, number: int) -> Path:
    return out / arm / f"{number:02d}"


def key_file(out: Path) -> Path:
    """Return the key file of the ledgers of this demonstration. Store a real key elsewhere."""
    path = out / "ledger.key"
    if not path.exists():
        path.write_text(secrets.token_hex(32))
    return path


# Digits: with the Python interface


def run_digits(args: argparse.Namespace) -> None:
    out, seed, classes = args.output_dir, args.seed, args.forget == "classes"
    forget, remaining, holdout = digits_requests(args.requests, seed, classes)
    every = [row for rows in forget for row in rows]
    original = trained_vit(out / "original", every + remaining, seed)
    retrained = trained_vit(out / "retrained", remaining, seed)
    collator, key = PaddingCollator(), read_key(key_file(out))

    def collect(model: Any, rows: Rows) -> Any:
        return collect_statistics(model, rows, collator=collator, batch_size=64, fisher=True, progress=False)

    def fulfil(model: Any, rows: Rows, folder: Path, source: str, **more: Any) -> None:
        splits = {"retain": remaining, "holdout": holdout, **more.pop("earlier", {})}
        request = DeletionRequest(
            models=RequestModels(
                original=model,
                retrained=retrained,
                processing_class=digits_demo.digits_processor(),
                collator=collator,
            ),
            rows=RequestRows(
                forget=rows,
                evaluation=splits,
                source=f"scikit-learn digits, {source}",
                forgotten_before=more.pop("again", ()),
            ),
            **more,
        )
        fulfil_request(request, digits_config(folder, args.constraint, classes, seed))
        print(f"{folder} is done", flush=True)

    for arm in ARMS:
        for number, rows in enumerate(forget, 1):
            series = RequestSeries(Ledger(out / arm / "ledger", key))
            if series.number > number:
                continue
            model = ViTForImageClassification.from_pretrained(series.model_folder or original).eval()
            present_rows = [row for later in forget[number - 1 :] for row in later] + remaining
            carried = series.statistics(model) if arm != "fresh" else None
            earlier = {f"forgotten_{n}": old for n, old in enumerate(forget[: number - 1], 1)}
            fulfil(
                model,
                rows,
                folder_of(out, arm, number),
                f"{args.forget} {number} of {len(forget)}",
                earlier=earlier,
                statistics=carried or collect(model, present_rows),
                series=series.begin(rows),
                again=[row for old in earlier.values() for row in old] if arm == "again" else (),
            )
    if not (folder_of(out, "joint", 1) / reporting.REPORT).is_file():
        model = ViTForImageClassification.from_pretrained(original).eval()
        fulfil(
            model,
            every,
            folder_of(out, "joint", 1),
            f"{args.forget} 1 to {len(forget)}",
            statistics=collect(model, every + remaining),
        )


def digits_requests(count: int, seed: int, classes: bool) -> tuple[list[Rows], Rows, Rows]:
    """Return the rows of each request, the remaining rows, and held-out rows of the classes that are kept."""
    if not classes:
        splits = digits_demo.digits_splits(f"rows:{14 * count}", seed)
        return [splits.forget[14 * k : 14 * k + 14] for k in range(count)], splits.retain, splits.holdout
    splits = [digits_demo.digits_splits(f"class:{digit}", seed) for digit in range(count)]
    kept = [[row for row in rows if row["labels"] >= count] for rows in (splits[0].retain, splits[0].holdout)]
    return [split.forget for split in splits], *kept


def digits_config(folder: Path, constraint: str | None, classes: bool, seed: int) -> UnlearningConfig:
    """Return the settings of the demonstration."""
    return UnlearningConfig(
        str(folder),
        overwrite_output_dir=True,
        loss="next_best",
        constraint=constraint or ("kronecker" if classes else "ridge"),
        learning_rate=4e-3,
        num_train_epochs=60,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=256,
        eval_on_start=True,
        forget_metric="accuracy",
        forget_target=0.02 if classes else None,
        logging_strategy="steps",
        disable_tqdm=True,
        seed=seed,
        use_cpu=True,
    )


def trained_vit(folder: Path, rows: Rows, seed: int) -> Any:
    """Train a model on `rows` unless the folder has one."""
    if not (folder / "config.json").is_file():
        with tempfile.TemporaryDirectory() as scratch:
            digits_demo.train_vit(rows, seed, scratch).save_pretrained(folder)
    return ViTForImageClassification.from_pretrained(folder).eval() if folder.name == "retrained" else folder


# TOFU: with the command line only


def run_tofu(args: argparse.Namespace, flags: Sequence[str]) -> None:
    """Learn ten authors and forget one per request; further flags are passed to `hf-unlearn run`."""
    out, every = args.output_dir, 10
    common = ["--train", f"full[0:{20 * every}]", "--holdout", f"full[{20 * every}:{20 * every + 20}]", *flags]
    keyed = ["--ledger_key_file", str(key_file(out)), "--retrained", "none", "--overwrite_output_dir", "True"]

    def call(*line: str) -> None:
        if code := hf_unlearn(list(line)):  # the command has printed the reason
            raise SystemExit(code)

    for arm in ARMS:
        for number in range(1, args.requests + 1):
            folder, last = folder_of(out, arm, number), folder_of(out, arm, number - 1)
            ledger = Ledger(out / arm / "ledger")
            if ledger.exists() and len(ledger.requests()) >= number:
                continue
            more = ["--ledger", str(out / arm / "ledger"), "--output_dir", str(folder)]
            more += ["--forget_again", str(arm == "again")]
            if arm == "fresh" and number > 1:
                fresh = out / arm / "statistics"
                data = [flag for name in ("--dataset_name", "--max_length") for flag in value_of(flags, name)]
                data = data or ["--dataset_name", "locuslab/TOFU"]
                constraint = value_of(flags, "--constraint")[1:] or [
                    files.read_yaml(Path(args.settings)).get("constraint")
                ]
                data += ["--fisher", str(constraint == ["kronecker"])]
                call(
                    "collect",
                    "--model_name_or_path",
                    str(last),
                    *data,
                    "--rows",
                    f"full[{20 * (number - 1)}:{20 * every}]",
                    "--output_dir",
                    str(fresh),
                    "--overwrite_output_dir",
                    "True",
                )
                more += ["--statistics", str(fresh)]
            call("run", args.settings, *common, *keyed, *more, "--forget", author(number), "--max_rows", "40")
            for old in last.glob("*.safetensors"):
                old.unlink()  # no later request starts from these weights
    if not (folder_of(out, "joint", 1) / reporting.REPORT).is_file():
        call(
            "run",
            args.settings,
            *common,
            "--forget",
            f"full[0:{20 * args.requests}]",
            "--max_rows",
            "40",
            "--output_dir",
            str(folder_of(out, "joint", 1)),
        )


def author(number: int) -> str:
    return f"full[{20 * (number - 1)}:{20 * number}]"


def value_of(flags: Sequence[str], name: str) -> list[str]:
    return list(flags[flags.index(name) : flags.index(name) + 2]) if name in flags else []


# Results


def read(out: Path) -> Arms:
    """Load the reports of each arm, by request; raises `OutputError` if one is missing."""
    counts = {arm: len(list((out / arm).glob(f"*/{reporting.REPORT}"))) for arm in (*ARMS, "joint")}
    return {
        arm: [UnlearningReport.load(folder_of(out, arm, k + 1)) for k in range(max(n, 1))] for arm, n in counts.items()
    }


def markdown(runs: Sequence[Arms], metric: str) -> str:
    """Format one line per arm after its last request, and lines for the original and the retrained model."""
    lines = [[*HEADER], ["---"] + ["---:"] * (len(HEADER) - 1)]
    for label, arm, model in ROWS:
        columns = zip(*(cells(run[arm], metric, model) for run in runs), strict=True)
        lines.append([label, *(spread(values, digits) for values, digits in zip(columns, DIGITS, strict=True))])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


ROWS = (
    ("original", "joint", "original"),
    *((arm, arm, "unlearned") for arm in (*ARMS, "joint")),
    ("retrained", "joint", "retrained"),
)
HEADER = (
    "arm",
    "requests",
    "all forgotten rows",
    "most of an earlier set",
    "retain",
    "holdout",
    "drift used",
    "room, first",
    "room, last",
    "negative energy",
    "s per request",
)
DIGITS = (0, 3, 3, 3, 3, 4, 4, 4, 5, 1)


def cells(reports: Sequence[UnlearningReport], metric: str, model: str) -> list[float | None]:
    """Return the values of the columns of `HEADER` for one arm of one run."""
    first, last = reports[0], reports[-1]
    known, retain, holdout = (
        tables.forgotten_so_far(last, metric, model),
        last.get(metric, "retain", model),
        last.get(metric, "holdout", model),
    )
    is_unlearned = model == "unlearned"
    return [
        float(len(reports)) if is_unlearned else None,
        known,
        worst_earlier(last, metric) if is_unlearned else None,
        retain and retain.value,
        holdout and holdout.value,
        drift_used(last) if is_unlearned else None,
        room(first) if is_unlearned else None,
        room(last) if is_unlearned else None,
        last.series.get("negative_share") if is_unlearned else None,
        sum(map(seconds, reports)) / len(reports) if is_unlearned else None,
    ]


def worst_earlier(report: UnlearningReport, metric: str) -> float | None:
    """Return the largest metric of an earlier forget set, which shows whether forgotten rows come back."""
    earlier = [
        m.value for m in report.metrics if m.name == metric and m.model == "unlearned" and "forgotten_" in m.split
    ]
    return max(earlier, default=None)


def drift_used(report: UnlearningReport) -> float:
    return report.series["drift_used"]["relative"] if report.series else report.drift["relative"]


def room(report: UnlearningReport) -> float | None:
    return (report.series.get("room") or {}).get("mean")


def seconds(report: UnlearningReport) -> float:
    """Return the seconds from the request to the unlearned weights (the fresh arm collects in a separate command)."""
    return report.timings["subtract"] + report.timings["unlearn"]


def spread(values: Sequence[float | None], digits: int) -> str:
    """Format mean and range, as in `0.981 (0.975-0.990)`."""
    present = [value for value in values if value is not None]
    if not present:
        return "-"
    mean, low, high = sum(present) / len(present), min(present), max(present)
    return f"{mean:.{digits}f}" + (f" ({low:.{digits}f}-{high:.{digits}f})" if len(set(present)) > 1 else "")


if __name__ == "__main__":
    sys.exit(main())
