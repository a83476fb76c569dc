"""Measure the error and the cost of sketches of wide Grams: `wide.py error MODEL TEXT` and `wide.py time`.

MODEL is the folder of a causal language model, TEXT a file of paragraphs. Each command prints a Markdown table of
docs/results/wide_layers.md. On one core `error` on stories260K takes half a minute, `time` two and a half (3 GB).
"""

import argparse
import time
from collections.abc import Callable, Mapping
from math import isnan
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_unlearn import Constraint, EnergyConstraint, PaddingCollator, RidgeConstraint, collect_statistics
from hf_unlearn.statistics import Eigen, eigendecomposition
from hf_unlearn.statistics.early_stop import lost_energy
from hf_unlearn.statistics.sketch import add_sketch, sketch_of
from hf_unlearn.statistics.sums import add_products, mirror

SHARES = (16, 8, 4, 2)
ENERGY = EnergyConstraint(0.9, "eigenvalues")
CONSTRAINTS: Mapping[str, Constraint] = {
    "energy 0.9": ENERGY,
    "singular values 0.9": EnergyConstraint(0.9),
    "ridge 0.003": RidgeConstraint(),
}
WIDE, ROWS, EXACT = 14336, 2048, 3584


def drift(step_OI: Tensor, gram_II: Tensor) -> float:
    """Return the change of the layer's outputs on the rows of the exact Gram, for a step of norm 1."""
    return float(((step_OI @ gram_II) * step_OI).sum().sqrt() / step_OI.norm())


def compare(gram_II: Tensor, exact: Eigen, gradient_OI: Tensor, rank: int) -> dict[str, float]:
    """Compare one layer at one rank: energies, largest principal angle of the energy-0.9 basis, drift ratios."""
    sketched_eigen = eigendecomposition(sketch_of(gram_II, rank))
    needed, values_I = exact.rank(ENERGY.energy, ENERGY.spectrum), exact.values_I
    common = min(needed, rank)
    basis_IK = sketched_eigen.vectors_II[:, :common]
    cosines_K = torch.linalg.svdvals(basis_IK.T @ exact.vectors_II[:, :common]).clamp(max=1)
    numbers = {
        "missed": sketched_eigen.missed_share,
        "best": float(values_I[rank:].sum() / values_I.sum()),
        "needed": needed,
        "lost": lost_energy(exact, basis_IK),
        "angle": float(torch.rad2deg(torch.arccos(cosines_K.min()))) if needed <= rank else float("nan"),
    }
    for name, constraint in CONSTRAINTS.items():
        sketched, whole = (drift(constraint.right(gram)(gradient_OI), gram_II) for gram in (sketched_eigen, exact))
        numbers[name], numbers[f"{name} exact"] = sketched / whole, drift(gradient_OI, gram_II) / whole
    return numbers


def read_rows(tokenizer: Any, text: Path, count: int) -> list[dict[str, Any]]:
    paragraphs = [part for part in text.read_text(encoding="utf-8").split("\n\n") if len(part) > 40][:count]
    return [dict(tokenizer(part, truncation=True, max_length=256)) for part in paragraphs]


def errors(folder: Path, text: Path, layers: list[str], count: int) -> None:
    """Collect statistics of `count` paragraphs; the step is the gradient of twenty others."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = read_rows(AutoTokenizer.from_pretrained(folder), text, count + 20)
    statistics = collect_statistics(model, rows[20:], layers=layers, sketch_above=None, progress=False)
    batch = PaddingCollator()(rows[:20])
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model(**batch, labels=labels).loss.backward()
    print(f"{folder.name}, {len(rows) - 20} rows, {next(iter(statistics.positions.values()))} positions\n")
    print(
        "| layer | I | R | missed | best | rank of 0.9 | lost | angle | "
        + " | ".join(f"drift, {name} (none)" for name in CONSTRAINTS)
        + " |\n|---|"
        + "---:|" * (7 + len(CONSTRAINTS))
    )
    by_rank: dict[int, list[dict[str, float]]] = {}
    for name in statistics.layers:
        gram_II, gradient = statistics.gram(name), model.get_submodule(name).weight.grad.double()
        exact = eigendecomposition(gram_II)
        for share in SHARES:
            rank = len(gram_II) // share
            by_rank.setdefault(rank, []).append(compare(gram_II, exact, gradient, rank))
            print(line(name, len(gram_II), rank, by_rank[rank][-1]))
    for rank, layer_errors in by_rank.items():
        mean = {key: sum(error[key] for error in layer_errors) / len(layer_errors) for key in layer_errors[0]}
        print(line("mean", len(gram_II), rank, mean))


def line(name: str, size: int, rank: int, numbers: Mapping[str, float]) -> str:
    drifts = " | ".join(f"{numbers[name]:.2f} ({numbers[f'{name} exact']:.1f})" for name in CONSTRAINTS)
    angle = "-" if isnan(numbers["angle"]) else f"{numbers['angle']:.0f}°"
    energies = f"{numbers['missed']:.1%} | {numbers['best']:.1%} | {numbers['needed']:.0f} | {numbers['lost']:.1%}"
    return f"| {name} | {size} | {rank} | {energies} | {angle} | {drifts} |"


def seconds(work: Callable[[], Any]) -> float:
    """Return CPU seconds, which other programs on the machine do not change."""
    start = time.process_time()
    work()
    return time.process_time() - start


def times() -> None:
    """Time collecting one batch of rows and decomposing: in their span, and in full at a quarter of the width."""
    rows_NI = torch.randn(ROWS, WIDE, dtype=torch.float64)
    print(f"{WIDE} features, {ROWS} rows, {torch.get_num_threads()} thread, seconds of the processor\n")
    print("| | bytes of the sums | sums of the rows, s | decomposition, s |\n|---|---:|---:|---:|")
    sums_II = torch.zeros(WIDE, WIDE, dtype=torch.float64)
    took = seconds(lambda: add_products(sums_II, rows_NI))
    corner_II = sums_II[:EXACT, :EXACT] + sums_II[:EXACT, :EXACT].T
    small = seconds(lambda: eigendecomposition(corner_II))
    cubed = small * (WIDE / EXACT) ** 3
    print(f"| exact | {8 * WIDE**2 / 1e9:.2f} GB | {took:.1f} | {cubed:.0f} ({small:.1f} at {EXACT}, cubed) |")
    mirror(sums_II)
    thin_eigen: list[Eigen] = []
    thin = seconds(lambda: thin_eigen.append(eigendecomposition(sums_II, ROWS)))
    probe_I8 = torch.randn(WIDE, 8, dtype=torch.float64)
    seen, held = (
        sums_II @ probe_I8,
        (thin_eigen[0].vectors_II * thin_eigen[0].values_I) @ (thin_eigen[0].vectors_II.T @ probe_I8),
    )
    error, peak = float((held - seen).norm() / seen.norm()), getrusage(RUSAGE_SELF).ru_maxrss / 1e6
    print(f"| exact, in the span of the rows | {8 * WIDE**2 / 1e9:.2f} GB | {took:.1f} | {thin:.1f} |")
    for rank in (1024, 2048):
        sums_IS = torch.zeros(WIDE, rank + 1, dtype=torch.float64)
        took = seconds(lambda sums_IS=sums_IS: add_sketch(sums_IS, rows_NI))  # type: ignore[misc]
        decomposed = seconds(lambda sums_IS=sums_IS: eigendecomposition(sums_IS))  # type: ignore[misc]
        print(f"| sketch of rank {rank} | {8 * sums_IS.numel() / 1e9:.2f} GB | {took:.1f} | {decomposed:.1f} |")
    print(f"\nIn the span: {len(thin_eigen[0].values_I)} vectors, product error {error:.0e}, peak memory {peak:.1f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    chosen = parser.add_subparsers(dest="what", required=True)
    error = chosen.add_parser("error")
    error.add_argument("model", type=Path)
    error.add_argument("text", type=Path)
    error.add_argument("--layers", nargs="+", default=["*down_proj"])
    error.add_argument("--rows", type=int, default=400)
    chosen.add_parser("time")
    args = parser.parse_args()
    torch.manual_seed(0)
    times() if args.what == "time" else errors(args.model, args.text, args.layers, args.rows)


if __name__ == "__main__":
    main()
