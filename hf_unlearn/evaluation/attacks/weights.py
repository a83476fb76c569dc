"""Attacks on the weights: relearning, quantisation, recalibration of batch norm. Shapes: O outputs, I inputs."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from hf_unlearn.evaluation.attacks.subject import NotRun, Outcome, Subject
from hf_unlearn.evaluation.metrics.classification import relearn_steps
from hf_unlearn.evaluation.metrics.intervals import Estimate, bootstrap_mean, undefined
from hf_unlearn.models.adapters import lora_layers
from hf_unlearn.models.forward import output_logits, predict
from hf_unlearn.models.layers import find_layers, layer_at, parameter_of
from hf_unlearn.models.modes import eval_mode, restored

BLOCK = 64  # weights that share a scale at 4 bits


def relearning(subject: Subject) -> Iterator[Outcome]:
    """Train on a few forget rows and see whether the others come back (Hu et al., ICLR 2025, arXiv 2406.13356)."""
    few, others = _divide(subject)
    yield from _relearn(subject, few, others, "relearned")


def relearning_on_other_data(subject: Subject) -> Iterator[Outcome]:
    """Train on rows that have nothing to do with the request, and see whether forget rows come back."""
    unrelated = subject.split("holdout", "test", "retain")
    rng = np.random.default_rng(subject.settings.seed)
    chosen = rng.permutation(len(unrelated))[: subject.settings.relearn_rows]
    everything = range(len(subject.rows["forget"]))
    yield from _relearn(subject, [unrelated[int(i)] for i in chosen], everything, "relearned_from_other_data")


def _divide(subject: Subject) -> tuple[list[Any], list[int]]:
    """The rows that the attacker has, and the places of the others."""
    forget = subject.rows["forget"]
    if len(forget) < 2:
        raise NotRun("it needs two forget rows at least, one to train on and one to judge")
    order = np.random.default_rng(subject.settings.seed).permutation(len(forget)).tolist()
    count = min(subject.settings.relearn_rows, len(forget) // 2)
    return [forget[i] for i in order[:count]], sorted(order[count:])


def _relearn(subject: Subject, rows: Sequence[Any], judged: Sequence[int], name: str) -> Iterator[Outcome]:
    settings, forget = subject.settings, [subject.rows["forget"][i] for i in judged]
    with restored(subject.model):
        curve = [subject.score(forget)]
        for _ in train(subject, rows):
            curve.append(subject.score(forget))
    yield Outcome(f"{name}_{subject.measure}", "forget", bootstrap_mean(curve[-1], settings.seed))
    yield Outcome(f"{name}_steps", "forget", _steps(subject, curve, judged), "less")


def _steps(subject: Subject, curve: Sequence[Any], judged: Sequence[int]) -> Estimate:
    settings = subject.settings
    if subject.original is None:
        return undefined("no original model was given, so that there is no score to come back to", len(judged))
    target = float(subject.original[list(judged)].mean())
    steps = relearn_steps([float(scores.mean()) for scores in curve], target, settings.margin)
    if not np.isfinite(steps):
        return undefined(f"more than {settings.relearn_steps} steps", len(judged))
    return Estimate(steps, None, None, len(judged))


def train(subject: Subject, rows: Sequence[Any]) -> Iterator[int]:
    """Plain AdamW steps on the mean loss of all `rows`, over every weight; yields after each step."""
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
                part = rows[start : start + size]
                batch = {key: value.to(device) for key, value in subject.tools.collator(part).items()}
                predictions = predict(model.eval(), batch)  # without dropout: the attack repeats
                losses_B = predictions.sum_by_row(predictions.nll_L) / predictions.lengths_B
                (losses_B.sum() / len(rows)).backward()
        optimizer.step()
        yield step


def quantisation(subject: Subject) -> Iterator[Outcome]:
    """Round the weights to 8 and to 4 bits (Zhang et al., ICLR 2025, arXiv 2410.16454)."""
    if next(lora_layers(subject.model), None) is not None:
        raise NotRun("the model has an adapter that is not merged; merge it first")
    for bits in (8, 4):
        with restored(subject.model):
            quantise(subject.model, bits)
            for split in ("forget", "retain"):
                if split in subject.rows:
                    found = bootstrap_mean(subject.score(subject.rows[split]), subject.settings.seed)
                    memory: Any = "more" if split == "forget" else "none"
                    yield Outcome(f"quantised_{bits}_bit_{subject.measure}", split, found, memory)


@torch.no_grad()
def quantise(model: nn.Module, bits: int) -> None:
    """Round the weight of every linear layer, but for the output embedding, to the nearest of `2^bits - 1` values.

    8 bits share a scale within an output row, 4 bits within 64 weights of one; the largest weight is kept.
    """
    for name, module in find_layers(model).items():
        layer = layer_at(name, module)
        weight: Any = getattr(module, parameter_of(name, module).rpartition(".")[2])
        weight_OI = layer.weight_OI(weight)
        weight.copy_(layer.stored(rounded(weight_OI.flatten(0, -2), bits).view_as(weight_OI)))


def rounded(weight_OI: Tensor, bits: int) -> Tensor:
    """The weight after symmetric rounding to nearest."""
    outputs, inputs = weight_OI.shape
    block = inputs if bits >= 8 else min(BLOCK, inputs)
    values = nn.functional.pad(weight_OI.float(), (0, -inputs % block)).reshape(outputs, -1, block)
    largest = 2 ** (bits - 1) - 1
    scale = values.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / largest
    return ((values / scale).round() * scale).reshape(outputs, -1)[:, :inputs].to(weight_OI.dtype)


def recalibration(subject: Subject) -> Iterator[Outcome]:
    """Take the statistics of batch norm afresh from retain rows, which may undo what only they had forgotten."""
    norms = [m for m in subject.model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        raise NotRun("the model has no batch norm with running statistics")
    retain = subject.split("retain", "holdout", "test")
    with restored(subject.model):
        recalibrate(subject, norms, retain)
        found = bootstrap_mean(subject.score(subject.rows["forget"]), subject.settings.seed)
    yield Outcome(f"recalibrated_{subject.measure}", "forget", found)


@torch.no_grad()
def recalibrate(subject: Subject, norms: Sequence[_BatchNorm], rows: Any) -> None:
    """Cumulative means over batches of `rows`; nothing else of the model is in training mode."""
    device, size = next(subject.model.parameters()).device, subject.tools.batch_size
    momenta = [norm.momentum for norm in norms]
    try:
        with eval_mode(subject.model):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None
                norm.train()
            for start in range(0, len(rows), size):
                part = [rows[i] for i in range(start, min(start + size, len(rows)))]
                if len(part) > 1 or len(rows) == 1:  # a single value has no variance
                    output_logits(subject.model, {k: v.to(device) for k, v in subject.tools.collator(part).items()})
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
