"""Slow twins of the losses and scores: float64 numpy, one label at a time, probabilities where the package has logs.

A twin takes dense logits (`[B, V]`, or `[B, T, V]` with `shifted` where position t predicts label t + 1) and labels,
and never calls the package. `Labels` is, for each row, the list of (logits that predict, true label).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Labels = list[list[tuple[NDArray, int]]]


def labelled(logits: NDArray, labels: NDArray, *, shifted: bool = False, skip_first: bool = False) -> Labels:
    """What predicts what, row by row, without the labels that are -100."""
    rows: Labels = []
    for b in range(len(labels)):
        if labels.ndim == 1:
            found = [(logits[b].astype(np.float64), int(labels[b]))] if labels[b] >= 0 else []
        else:
            found = []
            for t in range(labels.shape[1]):
                source = t - 1 if shifted else t
                if labels[b, t] >= 0 and source >= 0:
                    found.append((logits[b, source].astype(np.float64), int(labels[b, t])))
            found = found[1:] if skip_first and len(found) > 2 else found  # these rows have one answer each
        rows.append(found)
    return rows


def softmax(z: NDArray) -> NDArray:
    p = np.exp(z - z.max())
    return p / p.sum()


def nll(z: NDArray, y: int) -> float:
    return float(np.log(np.sum(np.exp(z - z[y]))))


def entropy(p: NDArray) -> float:
    seen = p[p > 0]
    return float(np.sum(seen * np.log(1 / seen)))


def without(z: NDArray, y: int) -> NDArray:
    """Probabilities of the other labels, made to sum to one; the true label has none."""
    p = softmax(z)
    p[y] = 0
    return p / p.sum()


def pairs(rows: Labels) -> list[tuple[NDArray, int]]:
    return [pair for row in rows for pair in row]


def grad_ascent(rows: Labels, original: Labels) -> float:
    return float(np.mean([-nll(z, y) for z, y in pairs(rows)]))


def pgu(rows: Labels, original: Labels, offset: float = 0.05, entropy_weight: float = 0.2) -> float:
    values = []
    for z, y in pairs(rows):
        p = softmax(z)
        away = 0.0 if p[y] <= offset else -np.log(1 + offset - p[y])
        values.append(away - entropy_weight * entropy(p))
    return float(np.mean(values))


def pgu_poison(rows: Labels, original: Labels, offset: float = 0.1, entropy_weight: float = 0.2) -> float:
    values = []
    for z, y in pairs(rows):
        p, others = softmax(z), np.delete(softmax(z), y)
        away = 0.0 if p[y] <= offset else -np.log(1 + offset - p[y])
        values.append(away + entropy_weight * entropy(others / others.sum()))
    return float(np.mean(values))


def cross_entropy(target: NDArray, z: NDArray) -> float:
    return float(sum(target[v] * nll(z, v) for v in range(len(z))))


def ce_u(rows: Labels, original: Labels) -> float:
    return float(np.mean([cross_entropy(without(z, y), z) for z, y in pairs(rows)]))


def next_best(rows: Labels, original: Labels) -> float:
    both = zip(pairs(rows), pairs(original), strict=True)
    return float(np.mean([cross_entropy(without(z_before, y), z) for (z, y), (z_before, _) in both]))


def npo(rows: Labels, original: Labels, beta: float = 0.1) -> float:
    """`(2 / beta) log(1 + (pi / pi_original)^beta)`: the paper's equation 3 in probabilities of whole answers."""
    values = []
    for row, before in zip(rows, original, strict=True):
        likelihood = np.prod([softmax(z)[y] for z, y in row])
        likelihood_before = np.prod([softmax(z)[y] for z, y in before])
        values.append(2 / beta * np.log1p((likelihood / likelihood_before) ** beta))
    return float(np.mean(values))


def simnpo(rows: Labels, original: Labels, beta: float = 4.5, delta: float = 0.0) -> float:
    """`(2 / beta) log(1 + geometric mean of the probabilities^beta * exp(beta delta))`."""
    values = []
    for row in rows:
        mean = np.prod([softmax(z)[y] ** (1 / len(row)) for z, y in row])
        values.append(2 / beta * np.log1p(mean**beta * np.exp(beta * delta)))
    return float(np.mean(values))


def likelihood_ratio(rows: Labels, original: Labels) -> NDArray:
    """`[B]`: how many times more likely each answer has become."""
    now, before = ([np.prod([softmax(z)[y] for z, y in row]) for row in given] for given in (rows, original))
    return np.array(now) / np.array(before)


def dpo(rows: Labels, original: Labels, other: Labels, other_original: Labels, beta: float = 0.1) -> float:
    """`other` are the alternate answers' labels; in ratios of likelihoods of whole answers."""
    odds = (likelihood_ratio(rows, original) / likelihood_ratio(other, other_original)) ** beta
    return float(np.mean(2 / beta * np.log1p(odds)))


def undial(rows: Labels, original: Labels, beta: float = 10.0) -> float:
    """The label's odds are divided by `e^beta`; what it loses goes to the others in proportion."""
    values = []
    for (z, y), (z_before, _) in zip(pairs(rows), pairs(original), strict=True):
        p = softmax(z_before)
        p[y] *= np.exp(-beta)
        values.append(cross_entropy(p / p.sum(), z))
    return float(np.mean(values))


def wga(rows: Labels, original: Labels, beta: float = 1.0) -> float:
    return float(np.mean([-(softmax(z)[y] ** beta) * nll(z, y) for z, y in pairs(rows)]))


def satimp(rows: Labels, original: Labels, beta1: float = 5.0, beta2: float = 1.0) -> float:
    return float(
        np.mean([-(softmax(z)[y] ** beta1 * (1 - softmax(z)[y]) ** beta2) * nll(z, y) for z, y in pairs(rows)])
    )


def pdu(rows: Labels, original: Labels) -> float:
    return float(np.mean([(sorted(z)[-1] - sum(z) / len(z)) ** 2 for z, _ in pairs(rows)]))


def distance(states: NDArray, target: NDArray) -> float:
    """Mean over all of them of squared differences."""
    difference = states.astype(np.float64) - target.astype(np.float64)
    return float(sum(d * d for d in difference.ravel()) / difference.size)


TWINS = {
    "pgu": pgu,
    "pgu_poison": pgu_poison,
    "next_best": next_best,
    "ce_u": ce_u,
    "grad_ascent": grad_ascent,
    "grad_diff": grad_ascent,
    "kl_min": grad_ascent,
    "npo": npo,
    "simnpo": simnpo,
    "undial": undial,
    "wga": wga,
    "satimp": satimp,
    "pdu": pdu,
}
SKIPS_FIRST = {"ce_u"}


def retain_nll(rows: Labels) -> float:
    return float(np.mean([nll(z, y) for z, y in pairs(rows)]))


def retain_kl(rows: Labels, original: Labels) -> float:
    """KL(original || model), mean over labels."""
    values = []
    for (z, _), (z_before, _) in zip(pairs(rows), pairs(original), strict=True):
        p, q = softmax(z_before), softmax(z)
        values.append(np.sum(p * np.log(p / q)))
    return float(np.mean(values))


def row_scores(rows: Labels) -> NDArray:
    """`[B, 4]`: loss, probability, accuracy, entropy."""
    scores = []
    for row in rows:
        likelihood = np.prod([softmax(z)[y] ** (1 / len(row)) for z, y in row])
        scores.append(
            [
                np.mean([nll(z, y) for z, y in row]),
                likelihood,
                np.mean([all(z[v] < z[y] for v in range(len(z)) if v != y) for z, y in row]),
                np.mean([entropy(softmax(z)) for z, _ in row]),
            ]
        )
    return np.array(scores)


def auc(members: NDArray, others: NDArray) -> float:
    """Share of (member, other) pairs in which the member scores higher, ties counting half."""
    return float(np.mean([1.0 if m > o else 0.5 if m == o else 0.0 for m in members for o in others]))
