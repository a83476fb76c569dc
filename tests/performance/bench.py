"""Measure the cost of collecting and constraining relative to plain passes and steps: `make bench`.

Every figure is a ratio of medians. In each round both sides run one after the other in one process. CPU seconds of all
threads are counted, so other work on the machine has little effect; `processes` and `request` use wall-clock time. The
figures are written as JSON and printed as the Markdown table of docs/results/speed.md. `authors.py` measures the code
of the PGU authors.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_unlearn import (
    UnlearningConfig,
    UnlearningTrainer,
    build_constraint,
    collect_statistics,
    constrain_optimizer,
    freeze_unprotected,
)
from hf_unlearn.cli.setup import hush
from hf_unlearn.constraints import CONSTRAINTS
from hf_unlearn.core.provenance import hardware, package_versions
from hf_unlearn.demo import run_digits
from hf_unlearn.statistics import eigendecomposition

HERE = Path(__file__).resolve().parent
VOCABULARY, LENGTH = 2048, 256
SETTINGS = {
    "energy": [{"energy": 0.5}, {"energy": 0.9}, {"energy": 0.99}],
    "ridge": [{}],
    "energy_ridge": [{}],
    "kronecker": [{}],
}


@dataclass(frozen=True)
class Figure:
    """One comparison: medians in seconds (or megabytes), and their ratio."""

    group: str
    what: str
    against: str
    measured: float
    baseline: float
    unit: str = "s"

    @property
    def ratio(self) -> float:
        return self.measured / self.baseline


def llama(width: int, layers: int) -> LlamaForCausalLM:
    """A Llama of random weights, MLP 3.5 times as wide as its width."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=7 * width // 2,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config).eval()


def rows_of(count: int, seed: int = 0) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (count, LENGTH), generator=generator).tolist()
    return [{"input_ids": row, "attention_mask": [1] * LENGTH, "labels": row} for row in tokens]


def in_turn(first: Callable[[], Any], second: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Median CPU seconds of both, timed alternately after a round that is not counted."""
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds + 1):
        for kept, work in zip(times, (first, second), strict=True):
            start = time.process_time()
            work()
            if number:
                kept.append(time.process_time() - start)
    return statistics.median(times[0]), statistics.median(times[1])


def batches(rows: list[dict[str, list[int]]], size: int) -> list[dict[str, torch.Tensor]]:
    chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
    return [{key: torch.tensor([row[key] for row in part]) for key in part[0]} for part in chunks]


def collecting(width: int, layers: int, rounds: int) -> list[Figure]:
    """Gram alone against forward passes, with Fisher against forward and backward passes, of the same batches."""
    model, rows, size = llama(width, layers), rows_of(16), 4
    model.requires_grad_(False)

    def forward() -> None:
        with torch.no_grad():
            for batch in batches(rows, size):
                model(**batch)

    def both() -> None:
        model.requires_grad_(True)
        for batch in batches(rows, size):
            model(**batch).loss.backward()
        model.zero_grad()
        model.requires_grad_(False)

    figures = []
    for fisher, plain, name in ((False, forward, "forward"), (True, both, "forward and backward")):
        collect = lambda fisher=fisher: collect_statistics(  # noqa: E731
            model, rows, fisher=fisher, batch_size=size, progress=False
        )
        what = f"collecting {'Grams and Fishers' if fisher else 'Grams'}, width {width}"
        figures.append(Figure("collecting", what, name, *in_turn(collect, plain, rounds)))
    return figures


def stepping(width: int, layers: int, rounds: int) -> list[Figure]:
    """The optimizer's step with and without a constraint; and the whole step, forward and backward passes included."""
    figures = []
    retain = collect_statistics(llama(width, layers), rows_of(8), fisher=True, batch_size=4, progress=False)
    for optim, make in (("SGD", torch.optim.SGD), ("AdamW", torch.optim.AdamW)):
        for name, all_settings in SETTINGS.items():
            for settings in all_settings:
                sides = []
                for constrained in (True, False):
                    model = llama(width, layers)
                    freeze_unprotected(model, retain.layers)
                    optimizer = make([p for p in model.parameters() if p.requires_grad], lr=1e-6)
                    if constrained:
                        constrain_optimizer(optimizer, model, retain, build_constraint(name, settings))
                    model(**batches(rows_of(2), 2)[0]).loss.backward()
                    sides.append((model, optimizer))
                label = name + "".join(f" {value:g}" for value in settings.values())
                steps = [optimizer.step for _, optimizer in sides]
                figures.append(Figure("step", f"{optim}, {label}", "plain step", *in_turn(*steps, rounds)))
                for tokens in (2048,):
                    whole = [whole_step(model, optimizer, tokens // LENGTH) for model, optimizer in sides]
                    what = f"{optim}, {label}, {tokens} tokens"
                    figures.append(
                        Figure("whole step", what, "plain whole step", *in_turn(*whole, max(3, rounds // 2)))
                    )
    return figures


def whole_step(model: nn.Module, optimizer: torch.optim.Optimizer, rows: int) -> Callable[[], None]:
    batch = batches(rows_of(rows), rows)[0]

    def step() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    return step


def trainer_step(width: int, layers: int, rounds: int) -> list[Figure]:
    """A run of the trainer with and without constraints, per step, its evaluation left out."""
    retain = collect_statistics(llama(width, layers), rows_of(8), fisher=True, batch_size=4, progress=False)

    def run(constraint: str) -> Callable[[], None]:
        def train() -> None:
            with tempfile.TemporaryDirectory() as folder:
                args = UnlearningConfig(
                    folder,
                    use_cpu=True,
                    disable_tqdm=True,
                    max_steps=3,
                    per_device_train_batch_size=8,
                    eval_strategy="no",
                    loss="next_best",
                    constraint=constraint,
                    logging_strategy="no",
                )
                trainer = UnlearningTrainer(llama(width, layers), args, rows_of(8, seed=1), statistics=retain)
                trainer.train()

        return train

    return [
        Figure("trainer", f"three steps, {name}", "three steps, none", *in_turn(run(name), run("none"), rounds))
        for name in CONSTRAINTS
        if name != "none"
    ]


def decomposing(rounds: int) -> list[Figure]:
    """Compare the eigen-decomposition of a Gram with the product of four times as many rows that makes it.

    Also compare the decomposition of a quarter as many rows as features, in their span, with the full one.
    """
    figures = []
    for width in (256, 512, 1024, 2048):
        rows = torch.randn(4 * width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        gram = rows.T @ rows
        times = in_turn(lambda gram=gram: eigendecomposition(gram), lambda rows=rows: rows.T @ rows, rounds)
        figures.append(Figure("decomposition", f"eigh in float64, width {width}", "its product", *times))
        few = rows[: width // 4].T @ rows[: width // 4]
        times = in_turn(
            lambda few=few: eigendecomposition(few, len(few) // 4), lambda few=few: eigendecomposition(few), rounds
        )
        figures.append(Figure("decomposition", f"of {width // 4} rows, width {width}", "eigh in float64", *times))
    return figures


def eva(width: int, layers: int, rounds: int) -> list[Figure]:
    """The statistics, decomposed, against PEFT's EVA (incremental SVD of layer inputs), rank 16, of two batches each.

    EVA repeats its rows until the components have converged, which takes hours on random rows. With a threshold that
    all similarities pass, it stops after comparing two batches.
    """
    from peft import EvaConfig, LoraConfig, get_peft_model
    from peft.tuners.lora.eva import initialize_lora_eva_weights

    rows = rows_of(16)

    def ours() -> None:
        model = llama(width, layers)
        collected = collect_statistics(model, rows, batch_size=8, progress=False)
        collected.decompose(collected.layers)

    def theirs() -> None:
        config = LoraConfig(
            r=16,
            init_lora_weights="eva",
            eva_config=EvaConfig(rho=1.0),
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        config.eva_config.tau = -1.0  # type: ignore[union-attr]
        model = get_peft_model(llama(width, layers), config, low_cpu_mem_usage=True)
        initialize_lora_eva_weights(model, batches(rows, 8), show_progress_bar=False)

    what = f"collecting and decomposing, width {width}, {layers} blocks"
    return [Figure("peers", what, "PEFT's EVA, rank 16", *in_turn(ours, theirs, rounds))]


def memory(width: int, layers: int) -> list[Figure]:
    """Peak memory of a process that collects or unlearns, against one that fine-tunes the same weights plainly."""
    peaks = {}
    for work in ("plain", "collect", *CONSTRAINTS):
        line = [sys.executable, str(HERE / "memory.py"), work, str(width), str(layers)]
        peaks[work] = float(subprocess.run(line, capture_output=True, text=True, check=True).stdout.split()[-1])
    return [
        Figure("memory", work, "plain fine-tuning", peak, peaks["plain"], "MB")
        for work, peak in peaks.items()
        if work != "plain"
    ]


def processes(width: int, layers: int) -> list[Figure]:
    """Collecting on two processes against one, each with a thread of its own."""
    seconds = {}
    for count in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
        line = [sys.executable, *launcher, str(HERE / "share.py"), str(width), str(layers)]
        done = subprocess.run(line, capture_output=True, text=True, check=True)
        seconds[count] = float(done.stdout.split()[-1])
    return [Figure("processes", "collecting on one", "on two", seconds[1], seconds[2])]


def request() -> list[Figure]:
    """Retraining in the demonstration against a request: forget rows, decompositions, steps, stopping rule."""
    figures = []
    for forget in ("class:3", "rows:140"):
        with tempfile.TemporaryDirectory() as folder:
            (report,) = run_digits(f"{folder}/out", forget, None, seed=0).values()
        request_seconds = report.timings["subtract"] + report.timings["unlearn"]
        figures.append(
            Figure("request", f"retraining, digits {forget}", "the request", report.timings["retrain"], request_seconds)
        )
    return figures


def markdown(figures: list[Figure]) -> str:
    lines = ["| group | what | against | ratio | measured | baseline |", "| --- | --- | --- | ---: | ---: | ---: |"]
    digits = {"s": 3, "MB": 0}
    lines += [
        f"| {f.group} | {f.what} | {f.against} | {f.ratio:.2f} | {f.measured:.{digits[f.unit]}f} {f.unit} | "
        f"{f.baseline:.{digits[f.unit]}f} {f.unit} |"
        for f in figures
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/bench.json"), help="%(default)s")
    parser.add_argument("--width", type=int, default=512, help="of the Llama (%(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="of it (%(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="timed ones (%(default)s)")
    parser.add_argument("--only", nargs="*", help="groups to run; default: all")
    args = parser.parse_args()
    hush()
    size = (args.width, args.layers)
    groups: dict[str, Callable[[], list[Figure]]] = {
        "collecting": lambda: collecting(*size, args.rounds),
        "stepping": lambda: stepping(*size, args.rounds),
        "trainer": lambda: trainer_step(*size, 3),
        "decomposing": lambda: decomposing(3),
        "eva": lambda: eva(256, 2, 3),
        "memory": lambda: memory(*size),
        "processes": lambda: processes(*size),
        "request": request,
    }
    figures: list[Figure] = []
    for name in args.only or groups:
        figures_of_group = groups[name]()
        print("\n".join(markdown(figures_of_group).splitlines()[2 if figures else 0 :]), flush=True)
        figures += figures_of_group
    record = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "hardware": f"{hardware()}, {torch.get_num_threads()} threads",
        "versions": package_versions(),
        "model": f"Llama of width {args.width}, {args.layers} layers, rows of {LENGTH} tokens",
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(
        json.dumps(record | {"figures": [asdict(f) | {"ratio": f.ratio} for f in figures]}, indent=1)
    )
    print(f"\n{record['model']}; {record['hardware']}; saved to {args.output}")


if __name__ == "__main__":
    main()
