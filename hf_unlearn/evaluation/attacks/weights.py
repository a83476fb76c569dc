"""Attacks on the weights: relearning, quantisation, recalibration of batch norm.

Shapes: O outputs, I inputs, N rows.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_unlearn.data.formats import Row, Rows
from hf_unlearn.evaluation.attacks.registry import register_attack
from hf_unlearn.evaluation.attacks.subject import Memory, NotRun, Outcome, Subject
from hf_unlearn.evaluation.metrics.classification import relearn_steps
from hf_unlearn.evaluation.metrics.intervals import Estimate, bootstrap_mean, undefined
from hf_unlearn.models.adapters import lora_layers
from hf_unlearn.models.forward import output_logits, predict
from hf_unlearn.models.layers import find_layers, layer_at, parameter_of
from hf_unlearn.models.modes import eval_mode, restored

BLOCK = 64  # weights that share a scale at 4 bits


@register_attack("relearning")
def relearning(subject: Subject) -> Iterator[Outcome]:
    """Train on a few forget rows and score the others (Hu et al., ICLR 2025, arXiv 2406.13356)."""
    rows, scored = _split_forget_rows(subject)
    yield from _relearn(subject, rows, scored, "relearned", "relearned_anamnesis_index")


@register_attack("relearning_on_other_data")
def relearning_on_other_data(subject: Subject) -> Iterator[Outcome]:
    """Train on rows that are unrelated to the request, and score all forget rows."""
    unrelated = subject.split("holdout", "test", "retain")
    rng = np.random.default_rng(subject.settings.seed)
    chosen = rng.permutation(len(unrelated))[: subject.settings.relearn_rows]
    scored = range(len(subject.rows["forget"]))
    yield from _relearn(subject, [unrelated[int(i)] for i in chosen], scored, "relearned_from_other_data")


def _split_forget_rows(subject: Subject) -> tuple[list[Row], list[int]]:
    """Return the forget rows that the attacker has, and the indices of the others."""
    forget = subject.rows["forget"]
    if len(forget) < 2:
        raise NotRun("it needs at least two forget rows, one to train on and one to score")
    order = np.random.default_rng(subject.settings.seed).permutation(len(forget)).tolist()
    count = min(subject.settings.relearn_rows, len(forget) // 2)
    return [forget[i] for i in order[:count]], sorted(order[count:])


def _relearn(
    subject: Subject, rows: Sequence[Row], scored: Sequence[int], name: str, anamnesis_index: str = ""
) -> Iterator[Outcome]:
    """Train on `rows` and score the forget rows with indices `scored` after every step."""
    settings, forget = subject.settings, [subject.rows["forget"][i] for i in scored]
    with restored(subject.model):
        curve = [subject.score(forget)]
        for _ in train(subject, rows):
            curve.append(subject.score(forget))
    yield Outcome(f"{name}_{subject.score_name}", "forget", bootstrap_mean(curve[-1], settings.seed))
    yield Outcome(f"{name}_steps", "forget", _steps(subject, curve, scored), "less", anamnesis_index)


def _steps(subject: Subject, curve: Sequence[NDArray], scored: Sequence[int]) -> Estimate:
    """Return the number of steps until the mean score is back at the original model's, within the margin."""
    settings = subject.settings
    if subject.original is None:
        return undefined("there is no original model whose score relearning could reach", len(scored))
    target = float(subject.original[list(scored)].mean())
    steps = relearn_steps([float(score_N.mean()) for score_N in curve], target, settings.margin)
    if not np.isfinite(steps):
        return undefined(f"more than {settings.relearn_steps} steps", len(scored))
    return Estimate(steps, None, None, len(scored))


def train(subject: Subject, rows: Sequence[Row]) -> Iterator[int]:
    """Take plain AdamW steps on the mean loss of all `rows`, over every weight; yield after each step."""
    model, settings = subject.model, subject.settings
    weights = [p for p in model.parameters() if p.is_floating_point()]
    for weight in weights:
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights, lr=settings.relearn_learning_rate, weight_decay=0.0)
    device, size = weights[0].device, subject.tools.batch_size
    for step in range(settings.relearn_steps):
        optimizer.zero_grad()
        with torch.enable_grad():
            for start in range(0, len(rows), size):
                collated = subject.tools.collator(rows[start : start + size])
                batch = {key: value.to(device) for key, value in collated.items()}
                predictions = predict(model.eval(), batch)  # without dropout, so that the attack is reproducible
                losses_B = predictions.sum_by_row(predictions.nll_L) / predictions.lengths_B
                (losses_B.sum() / len(rows)).backward()
        optimizer.step()
        yield step


@register_attack("quantisation")
def quantisation(subject: Subject) -> Iterator[Outcome]:
    """Round the weights to 8 and to 4 bits (Zhang et al., ICLR 2025, arXiv 2410.16454)."""
    if next(lora_layers(subject.model), None) is not None:
        raise NotRun("the model has an adapter that is not merged; merge it first")
    for bits in (8, 4):
        with restored(subject.model):
            quantise(subject.model, bits)
            for split in ("forget", "retain"):
                if split in subject.rows:
                    estimate = bootstrap_mean(subject.score(subject.rows[split]), subject.settings.seed)
                    memory: Memory = "more" if split == "forget" else "none"
                    yield Outcome(f"quantised_{bits}_bit_{subject.score_name}", split, estimate, memory)


@torch.no_grad()
def quantise(model: nn.Module, bits: int) -> None:
    """Round the weight of every linear layer except the output embedding to the nearest of `2^bits - 1` values.

    With 8 bits each output row has a scale, with 4 bits each block of 64 weights of a row; the largest weight of a
    block is unchanged.
    """
    for name, module in find_layers(model).items():
        layer = layer_at(name, module)
        weight: Tensor = getattr(module, parameter_of(name, module).rpartition(".")[2])
        weight_OI = layer.weight_OI(weight)
        weight.copy_(layer.stored(rounded(weight_OI.flatten(0, -2), bits).view_as(weight_OI)))


def rounded(weight_OI: Tensor, bits: int) -> Tensor:
    """Return the weight after symmetric rounding to the nearest value; see `quantise`.

    >>> rounded(torch.tensor([[7.0, 3.4, -7.0]]), bits=4)
    tensor([[ 7.,  3., -7.]])
    """
    outputs, inputs = weight_OI.shape
    block = inputs if bits >= 8 else min(BLOCK, inputs)
    values = nn.functional.pad(weight_OI.float(), (0, -inputs % block)).reshape(outputs, -1, block)
    largest = 2 ** (bits - 1) - 1
    scale = values.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / largest
    return ((values / scale).round() * scale).reshape(outputs, -1)[:, :inputs].to(weight_OI.dtype)


@register_attack("recalibration")
def recalibration(subject: Subject) -> Iterator[Outcome]:
    """Recompute the statistics of batch norm from retain rows; this undoes unlearning that changed only them."""
    norms = [m for m in subject.model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        raise NotRun("the model has no batch norm with running statistics")
    retain = subject.split("retain", "holdout", "test")
    with restored(subject.model):
        recalibrate(subject, norms, retain)
        estimate = bootstrap_mean(subject.score(subject.rows["forget"]), subject.settings.seed)
    yield Outcome(f"recalibrated_{subject.score_name}", "forget", estimate)


@torch.no_grad()
def recalibrate(subject: Subject, norms: Sequence[_BatchNorm], rows: Rows) -> None:
    """Set the running statistics to cumulative means over batches of `rows`; the rest of the model is in eval mode."""
    device, size = next(subject.model.parameters()).device, subject.tools.batch_size
    momenta = [norm.momentum for norm in norms]
    try:
        with eval_mode(subject.model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
                norm.train()
            for start in range(0, len(rows), size):
                chosen = [rows[i] for i in range(start, min(start + size, len(rows)))]
                if len(chosen) > 1 or len(rows) == 1:  # a single value has no variance
                    output_logits(subject.model, {k: v.to(device) for k, v in subject.tools.collator(chosen).items()})
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
