"""Compare constraints that weigh input and output directions together with those of the package.

    python recipes/experiments/two_sided.py images recipes/default/digits_rows.yaml --seeds 0,1,2

None of them was better than the default, so they are not part of the package. The first two arguments and further
options are those of `hf-unlearn benchmark`. Each line of the table is the default with another constraint, from the
same models and down to the same target. In addition to the constraints of the package, with their own defaults:

- `joint`: in the eigenbases of Fisher and Gram each entry of a step is multiplied by `1 / (1 + s_i a_j / scale)`, the
  exact minimum of `|D' - D|^2 + tr(fisher D' gram D'^T) / scale`, which the Kronecker constraint approximates;
- `ek-fac`: the same with measured second moments of the rows' gradients in place of `s_i a_j` (George et al., NeurIPS
  2018, arXiv 1806.03884), from one pass over the evaluated retain rows, at most `max_rows`;
- both again after energy's cut of the inputs.

Each scale is chosen as in the default: the mean share that passes in the remaining directions is 0.7. Layers that are
neither `Linear` nor `Conv1D`, or that saw too few positions for complete bases, keep the constraint of the default.
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from retain_data import MODELS, collected, default_cells, row, start, unlearned
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers.pytorch_utils import Conv1D

from hf_unlearn import EnergyRidgeConstraint, RetainStatistics, UnlearningReport, UnlearningTrainer
from hf_unlearn.benchmark import Benchmark, results
from hf_unlearn.deletion import DeletionRequest, build_request
from hf_unlearn.models import modes, predict
from hf_unlearn.statistics import eigen

PACKAGE = ("energy_ridge", "energy", "ridge", "kronecker")
TOGETHER = {"joint": (False, False), "ek-fac": (True, False), "joint, cut": (False, True), "ek-fac, cut": (True, True)}


def main() -> int:
    return start(__doc__, compare)


def compare(benchmark: Benchmark, options: Sequence[str]) -> str:
    """Return the table. Raises the errors of `hf-unlearn benchmark`."""
    groups: dict[str, list[tuple[UnlearningReport, str]]] = {}
    for cell in default_cells(benchmark, options):
        request = build_request(replace(cell.args, constraints=None, use_retain_rows=True), cell.config, fisher=False)
        statistics = collected(request, cell.config, fisher=True)
        measured = moments(request, statistics, cell.config.per_device_eval_batch_size)
        for name in (*PACKAGE, *TOGETHER):
            config = cell.config.but(constraint=name if name in PACKAGE else "energy_ridge", constraint_settings=None)
            change = None if name in PACKAGE else together(statistics, measured, *TOGETHER[name])
            report = unlearned(request, config, statistics, change=change)
            for model in [m for m in MODELS if name == PACKAGE[0] and m in report.models]:
                groups.setdefault(model, []).append((report, model))
            groups.setdefault(name, []).append((report, "unlearned"))
    columns = [column for column in benchmark.columns if results.values(next(iter(groups.values())), column)]
    head = ["", *(column.title for column in columns), "steps", "unlearning, s"]
    rows = [row(name, group, columns) for name, group in groups.items()]
    return results.table([head, *([name, *numbers] for name, _, *numbers in rows)])


@dataclass(frozen=True, eq=False)
class InEigenbases:
    """Shrink each entry of a step in the eigenbases of its layer; replaces a `BoundConstraint`."""

    outputs_OO: Tensor
    inputs_II: Tensor
    kept_OI: Tensor
    anchored: bool = False

    def __call__(self, step_OI: Tensor) -> Tensor:
        inside_OI = self.outputs_OO.T @ step_OI @ self.inputs_II
        return self.outputs_OO @ (inside_OI * self.kept_OI) @ self.inputs_II.T


def together(
    statistics: RetainStatistics, measured: Mapping[str, Tensor], ek_fac: bool, cut: bool
) -> Callable[[UnlearningTrainer], None]:
    """Return a function that replaces the constraint of a trainer by the two-sided maps."""
    default = EnergyRidgeConstraint()

    def change(trainer: UnlearningTrainer) -> None:
        for part in trainer.constrainer.weights:
            if part.owner not in measured or part.bound is None:
                continue
            gram, fisher = statistics.gram_eigen(part.owner), statistics.fisher_eigen(part.owner)
            price_OI = measured[part.owner] if ek_fac else fisher.values_I.outer(gram.values_I)
            removed = gram.rank(default.energy, default.spectrum) if cut else 0
            left_OI = price_OI[:, removed:].double()
            seen = left_OI > left_OI.max() * 1e-12
            unseen = 1 - seen.double().mean().item()
            wanted = (default.free_share - unseen) / max(1 - unseen, 1e-12)
            scale = eigen.scale_for_share(left_OI[seen], wanted) if wanted > 0 else 0.0
            kept_OI = torch.where(seen, 1 / (1 + left_OI / scale) if scale else torch.zeros_like(left_OI), 1.0)
            kept_OI = torch.cat([torch.zeros_like(price_OI[:, :removed]), kept_OI.to(price_OI)], 1)
            part.bound = InEigenbases(fisher.vectors_II.float(), gram.vectors_II.float(), kept_OI.float())  # type: ignore

    return change


def moments(request: DeletionRequest, statistics: RetainStatistics, batch_size: int) -> dict[str, Tensor]:
    """`[O, I]` of each plain layer: mean square of a row's gradient in the eigenbases, labels drawn by the model."""
    model = request.models.original
    bases = {}
    for name in statistics.layers:
        both = statistics.fisher_eigen(name), statistics.gram_eigen(name)
        plain = isinstance(model.get_submodule(name), nn.Linear | Conv1D)
        if plain and all(parts.missed is None and not parts.diagonal for parts in both):
            bases[name] = (both[0].vectors_II.float(), both[1].vectors_II.float())
    sums = {n: torch.zeros(fisher.shape[0], gram.shape[0]) for n, (fisher, gram) in bases.items()}
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(0)
    retain = request.rows.splits["retain"]
    for batch in DataLoader(retain, batch_size, collate_fn=request.models.collator):
        inputs = {key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)}
        with modes.eval_mode(model), watched(model, bases, sums):
            logits_LV = predict(model, inputs).logits_LV.float()
            drawn_L = torch.multinomial(logits_LV.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
            F.cross_entropy(logits_LV, drawn_L.to(device), reduction="sum").backward()
        model.zero_grad()
    return {name: total / len(retain) for name, total in sums.items()}


@contextmanager
def watched(model: nn.Module, bases: Mapping[str, tuple[Tensor, Tensor]], sums: Mapping[str, Tensor]) -> Iterator[None]:
    """Scope in which the backward pass adds each row's squared gradient, in the eigenbases, to `sums`."""
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, inputs, output: seen.__setitem__(name, inputs[0].detach())

    def add(name: str) -> Callable[..., None]:
        fisher, gram = bases[name]

        def hook(module: nn.Module, before: Any, gradients: tuple[Tensor, ...]) -> None:
            x, y = seen.pop(name) @ gram, gradients[0] @ fisher
            x_BTI, y_BTO = (rows.reshape(len(rows), -1, rows.shape[-1]) for rows in (x, y))
            for x_TI, y_TO in zip(x_BTI, y_BTO, strict=True):  # an [O, I] matrix a row, not a [B, O, I] one
                sums[name].add_((y_TO.T @ x_TI).square())

        return hook

    layers = {name: model.get_submodule(name) for name in bases}
    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    handles += [layer.register_full_backward_hook(add(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


if __name__ == "__main__":
    sys.exit(main())
