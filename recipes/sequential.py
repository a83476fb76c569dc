"""Deletion requests in a row, against collecting afresh before each, and against one request for all of it.

    python recipes/sequential.py digits --output_dir outputs/sequential/rows-0
    python recipes/sequential.py digits --forget classes --requests 5 --output_dir outputs/sequential/classes-0
    python recipes/sequential.py tofu --output_dir outputs/sequential/tofu
    python recipes/sequential.py table outputs/sequential/rows-*

Four arms from one original, each request stopped by the recipe's own rule:
  carried  the retain statistics of one request are the full statistics of the next (no retain row is read)
  again    the same, and each request trains on the rows of all earlier ones as well (`forget_again`)
  fresh    statistics are collected anew on the last model before each request (all rows left are read)
  joint    one request for all the rows
After each request all earlier forget sets are tested again. Killed and started again it goes on with the request that
was not completed. It prints a Markdown table and draws `series.png`.
"""

import argparse
import secrets
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import ViTForImageClassification

from hf_unlearn.cli import main as hf_unlearn
from hf_unlearn.cli.setup import hush
from hf_unlearn.core.files import read_yaml
from hf_unlearn.data.batches import PaddingCollator
from hf_unlearn.deletion.fulfil import fulfil_request
from hf_unlearn.deletion.ledger import Ledger
from hf_unlearn.deletion.ledger_key import read_key
from hf_unlearn.deletion.request import DeletionRequest, RequestModels, RequestRows
from hf_unlearn.deletion.series import RequestSeries
from hf_unlearn.demo.digits import Rows, digits_processor, digits_splits, train_vit
from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.report import REPORT, UnlearningReport
from hf_unlearn.evaluation.tables import forgotten_so_far
from hf_unlearn.publishing.series_plot import save_series_plot
from hf_unlearn.statistics.collect import collect_statistics
from hf_unlearn.trainer.config import UnlearningConfig

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
    tofu.add_argument("--settings", default=str(Path(__file__).with_name("tofu.yaml")))
    tofu.add_argument("--requests", type=int, default=5, help="authors, of ten that the model is made to know")
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
        hush(bars=args.task == "tofu")
        args.output_dir.mkdir(parents=True, exist_ok=True)
        run_digits(args) if args.task == "digits" else run_tofu(args, flags)
        arms, metric = read(args.output_dir), "accuracy" if args.task == "digits" else "answer_probability"
        save_series_plot(arms, args.output_dir / "series.png", metric)
        print(markdown([arms], metric))
    except UnlearningError as error:
        print(f"sequential.py: {error}", file=sys.stderr)
        return 2
    return 0


def folder_of(out: Path, arm: str, number: int) -> Path:
    return out / arm / f"{number:02d}"


def key_file(out: Path) -> Path:
    """The key of a demonstration's ledgers; keep that of a real one elsewhere."""
    path = out / "ledger.key"
    if not path.exists():
        path.write_text(secrets.token_hex(32))
    return path


# Digits: by the Python interface


def run_digits(args: argparse.Namespace) -> None:
    out, seed, classes = args.output_dir, args.seed, args.forget == "classes"
    forget, left, holdout = digits_requests(args.requests, seed, classes)
    every = [row for rows in forget for row in rows]
    original = made(out / "original", every + left, seed)
    retrained = made(out / "retrained", left, seed)
    collator, key = PaddingCollator(), read_key(key_file(out))

    def collect(model: Any, rows: Rows) -> Any:
        return collect_statistics(model, rows, collator=collator, batch_size=64, fisher=True, progress=False)

    def ask(model: Any, rows: Rows, folder: Path, source: str, **more: Any) -> None:
        splits = {"retain": left, "holdout": holdout, **more.pop("earlier", {})}
        request = DeletionRequest(
            models=RequestModels(
                original=model, retrained=retrained, processing_class=digits_processor(), collator=collator
            ),
            rows=RequestRows(
                forget=rows, evaluation=splits, source=f"scikit-learn digits, {source}",
                forgotten_before=more.pop("again", ()),
            ),
            **more,
        )  # fmt: skip
        fulfil_request(request, digits_config(folder, args.constraint, classes, seed))
        print(f"{folder} is done", flush=True)

    for arm in ARMS:
        for number, rows in enumerate(forget, 1):
            series = RequestSeries(Ledger(out / arm / "ledger", key))
            if series.number > number:
                continue
            model = ViTForImageClassification.from_pretrained(series.model_folder or original).eval()
            at_hand = [row for later in forget[number - 1 :] for row in later] + left
            carried = series.statistics(model) if arm != "fresh" else None
            earlier = {f"forgotten_{n}": old for n, old in enumerate(forget[: number - 1], 1)}
            ask(model, rows, folder_of(out, arm, number), f"{args.forget} {number} of {len(forget)}", earlier=earlier,
                statistics=carried or collect(model, at_hand), series=series.begin(rows),
                again=[row for old in earlier.values() for row in old] if arm == "again" else ())  # fmt: skip
    if not (folder_of(out, "joint", 1) / REPORT).is_file():
        model = ViTForImageClassification.from_pretrained(original).eval()
        ask(model, every, folder_of(out, "joint", 1), f"{args.forget} 1 to {len(forget)}",
            statistics=collect(model, every + left))  # fmt: skip


def digits_requests(count: int, seed: int, classes: bool) -> tuple[list[Rows], Rows, Rows]:
    """Rows of each request, rows left in the end, and held-out rows (of no forgotten class)."""
    if not classes:
        splits = digits_splits(f"rows:{14 * count}", seed)
        return [splits.forget[14 * k : 14 * k + 14] for k in range(count)], splits.retain, splits.holdout
    splits = [digits_splits(f"class:{digit}", seed) for digit in range(count)]
    kept = [[row for row in rows if row["labels"] >= count] for rows in (splits[0].retain, splits[0].holdout)]
    return [split.forget for split in splits], *kept


def digits_config(folder: Path, constraint: str | None, classes: bool, seed: int) -> UnlearningConfig:
    """The demonstration's settings."""
    return UnlearningConfig(
        str(folder), overwrite_output_dir=True, loss="next_best",
        constraint=constraint or ("kronecker" if classes else "ridge"), learning_rate=4e-3, num_train_epochs=60,
        per_device_train_batch_size=64, per_device_eval_batch_size=256, eval_on_start=True, forget_metric="accuracy",
        forget_target=0.02 if classes else None, logging_strategy="steps", disable_tqdm=True, seed=seed, use_cpu=True,
    )  # fmt: skip


def made(folder: Path, rows: Rows, seed: int) -> Any:
    """A model trained on `rows`, once."""
    if not (folder / "config.json").is_file():
        with tempfile.TemporaryDirectory() as scratch:
            train_vit(rows, seed, scratch).save_pretrained(folder)
    return ViTForImageClassification.from_pretrained(folder).eval() if folder.name == "retrained" else folder


# TOFU: by the command line alone


def run_tofu(args: argparse.Namespace, flags: Sequence[str]) -> None:
    """Ten authors are learnt, one is forgotten at each request; further flags go to `hf-unlearn run`."""
    out, every = args.output_dir, 10
    common = ["--train", f"full[0:{20 * every}]", "--holdout", f"full[{20 * every}:{20 * every + 20}]", *flags]
    keyed = ["--ledger_key_file", str(key_file(out)), "--retrained", "none", "--overwrite_output_dir", "True"]

    def call(*line: str) -> None:
        if code := hf_unlearn(list(line)):  # it has said why
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
                constraint = value_of(flags, "--constraint")[1:] or [read_yaml(Path(args.settings)).get("constraint")]
                data += ["--fisher", str(constraint == ["kronecker"])]
                call("collect", "--model_name_or_path", str(last), *data, "--rows",
                     f"full[{20 * (number - 1)}:{20 * every}]", "--output_dir", str(fresh),
                     "--overwrite_output_dir", "True")  # fmt: skip
                more += ["--statistics", str(fresh)]
            call("run", args.settings, *common, *keyed, *more, "--forget", author(number), "--max_rows", "40")
            for old in last.glob("*.safetensors"):
                old.unlink()  # nothing goes on from it any more
    if not (folder_of(out, "joint", 1) / REPORT).is_file():
        call("run", args.settings, *common, "--forget", f"full[0:{20 * args.requests}]", "--max_rows", "40",
             "--output_dir", str(folder_of(out, "joint", 1)))  # fmt: skip


def author(number: int) -> str:
    return f"full[{20 * (number - 1)}:{20 * number}]"


def value_of(flags: Sequence[str], name: str) -> list[str]:
    return list(flags[flags.index(name) : flags.index(name) + 2]) if name in flags else []


# What came of it


def read(out: Path) -> Arms:
    """The reports of each arm, by request; raises `OutputError` where one is missing."""
    counts = {arm: len(list((out / arm).glob(f"*/{REPORT}"))) for arm in (*ARMS, "joint")}
    return {
        arm: [UnlearningReport.load(folder_of(out, arm, k + 1)) for k in range(max(n, 1))] for arm, n in counts.items()
    }


def markdown(runs: Sequence[Arms], metric: str) -> str:
    """One line per arm after its last request, mean and range over runs; the original and the retrained model."""
    lines = [[*HEADER], ["---"] + ["---:"] * (len(HEADER) - 1)]
    for label, arm, model in ROWS:
        columns = zip(*(cells(run[arm], metric, model) for run in runs), strict=True)
        lines.append([label, *(spread(values, digits) for values, digits in zip(columns, DIGITS, strict=True))])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


ROWS = (
    ("original", "joint", "original"), *((arm, arm, "unlearned") for arm in (*ARMS, "joint")),
    ("retrained", "joint", "retrained"),
)  # fmt: skip
HEADER = ("arm", "requests", "all forgotten rows", "most of an earlier set", "retain", "holdout", "drift used",
          "room, first", "room, last", "negative energy", "s per request")  # fmt: skip
DIGITS = (0, 3, 3, 3, 3, 4, 4, 4, 5, 1)


def cells(reports: Sequence[UnlearningReport], metric: str, model: str) -> list[float | None]:
    """What stands under `HEADER` for one arm of one run."""
    first, last = reports[0], reports[-1]
    known, retain, holdout = (
        forgotten_so_far(last, metric, model), last.get(metric, "retain", model), last.get(metric, "holdout", model)
    )  # fmt: skip
    own = model == "unlearned"
    return [
        float(len(reports)) if own else None, known, worst_earlier(last, metric) if own else None,
        retain and retain.value, holdout and holdout.value, drift_used(last) if own else None,
        room(first) if own else None, room(last) if own else None,
        last.series.get("negative_share") if own else None,
        sum(map(seconds, reports)) / len(reports) if own else None,
    ]  # fmt: skip


def worst_earlier(report: UnlearningReport, metric: str) -> float | None:
    """The largest metric of an earlier forget set: does what was forgotten come back?"""
    found = [m.value for m in report.metrics if m.name == metric and m.model == "unlearned" and "forgotten_" in m.split]
    return max(found, default=None)


def drift_used(report: UnlearningReport) -> float:
    return report.series["drift_used"]["relative"] if report.series else report.drift["relative"]


def room(report: UnlearningReport) -> float | None:
    return (report.series.get("room") or {}).get("mean")


def seconds(report: UnlearningReport) -> float:
    """From the request to the unlearned weights; of the fresh arm of TOFU without collecting, a command of its own."""
    return report.timings["subtract"] + report.timings["unlearn"]


def spread(values: Sequence[float | None], digits: int) -> str:
    """Mean and range, as in `0.981 (0.975-0.990)`."""
    found = [value for value in values if value is not None]
    if not found:
        return "-"
    mean, low, high = sum(found) / len(found), min(found), max(found)
    return f"{mean:.{digits}f}" + (f" ({low:.{digits}f}-{high:.{digits}f})" if len(set(found)) > 1 else "")


if __name__ == "__main__":
    sys.exit(main())
