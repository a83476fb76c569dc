"""What a sketch of a Gram costs and gains: error on a real model's inputs, time and memory at 14336 features.

    python tests/benchmarks/wide.py MODEL TEXT

MODEL is a folder of a causal language model, TEXT a file of paragraphs. Prints the two Markdown tables of
recipes/README.md; one core, about three minutes, 6 GB.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_unlearn.collect import collect_statistics
from hf_unlearn.constraints import BoundConstraint, Constraint, EnergyConstraint, RidgeConstraint
from hf_unlearn.data import PaddingCollator
from hf_unlearn.linalg import Eigen, add_products, eigen
from hf_unlearn.sketch import add_sketch, sketch_map, sketch_of

RANKS = (16, 32, 64, 96, 128)
CONSTRAINTS: Mapping[str, Constraint] = {
    "energy 0.9": EnergyConstraint(0.9, "eigenvalues"),
    "energy 0.9 (singular values)": EnergyConstraint(0.9),
    "ridge 0.003": RidgeConstraint(),
}


def drift(step_OI: Tensor, weight_OI: Tensor, gram_II: Tensor) -> float:
    """Relative change of the layer's outputs on the rows behind the exact Gram."""
    return float(((step_OI @ gram_II * step_OI).sum() / (weight_OI @ gram_II * weight_OI).sum()).sqrt())


def largest_angle(found: Eigen, exact: Eigen, constraint: EnergyConstraint) -> float:
    """Largest principal angle, in degrees, from the sketch's basis of the exact rank to the exact one."""
    rank = exact.rank(constraint.energy, constraint.spectrum)
    if rank > found.values_I.numel():
        return 90.0
    cosines = torch.linalg.svdvals(found.vectors_II[:, :rank].T @ exact.vectors_II[:, :rank])
    return float(torch.rad2deg(torch.arccos(cosines.min().clamp(max=1))))


def one_layer(gram_II: Tensor, weight_OI: Tensor, gradient_OI: Tensor) -> list[dict[str, float]]:
    """For each rank the missed share, the largest angle, and drifts under sketch and exact Gram at equal norm."""
    exact, found = eigen(gram_II), []
    for rank in RANKS:
        parts = eigen(sketch_of(gram_II, rank))
        row = {"missed": parts.missed_share}
        for name, constraint in CONSTRAINTS.items():
            if isinstance(constraint, EnergyConstraint):
                row[f"{name} angle"] = largest_angle(parts, exact, constraint)
                row[f"{name} rank"] = exact.rank(constraint.energy, constraint.spectrum)
                row[f"{name} sketch rank"] = parts.rank(constraint.energy, constraint.spectrum)
            for which, gram in (("sketch", parts), ("exact", exact)):
                step_OI = BoundConstraint(constraint.right(gram), None, False)(gradient_OI)
                row[f"{name} {which}"] = drift(step_OI / step_OI.norm(), weight_OI / weight_OI.norm(), gram_II)
        row["none"] = drift(gradient_OI / gradient_OI.norm(), weight_OI / weight_OI.norm(), gram_II)
        found.append(row)
    return found


def rows_of(tokenizer: Any, text: Path, count: int) -> list[dict[str, Any]]:
    paragraphs = [part for part in text.read_text(encoding="utf-8").split("\n\n") if len(part) > 40][:count]
    return [dict(tokenizer(part, truncation=True, max_length=256)) for part in paragraphs]


def gradients(model: Any, rows: Sequence[dict[str, Any]]) -> None:
    batch = PaddingCollator()(rows)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    model(**batch, labels=labels).loss.backward()


def on_model(folder: Path, text: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = rows_of(tokenizer, text, 420)
    statistics = collect_statistics(model, rows[20:], layers=["*down_proj"], sketch_above=None, progress=False)
    gradients(model, rows[:20])
    by_layer = []
    for name in statistics.layers:
        weight = model.get_submodule(name).weight
        gram_II = statistics.gram(name)
        by_layer.append(one_layer(gram_II, weight.detach().double(), weight.grad.double()))
    n, width = next(iter(statistics.positions.values())), len(gram_II)
    print(f"{len(statistics.layers)} down_proj of {folder.name}, width {width}, {len(rows) - 20} rows, {n} positions")
    for index, rank in enumerate(RANKS):
        chosen = [layer[index] for layer in by_layer]
        mean = {key: sum(row[key] for row in chosen) / len(chosen) for key in chosen[0]}
        print(rank, {key: f"{value:.4g}" for key, value in mean.items()})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    on_model(args.model, args.text)
