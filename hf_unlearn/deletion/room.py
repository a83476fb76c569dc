"""How much room the constraint leaves for the next requests."""

import warnings
from collections.abc import Sequence

import torch

from hf_unlearn.constraints.base import ConstraintLike
from hf_unlearn.constraints.binding import bind_constraints
from hf_unlearn.constraints.factors import Factor
from hf_unlearn.statistics.retain_statistics import RetainStatistics
from hf_unlearn.statistics.sketch import is_sketch

ROOM_LEFT = 0.25
"""Warn when the room is, or at the present rate will be at the next request, below this share of that of the first."""


def running_out(rooms: Sequence[float]) -> bool:
    """Whether the last of the rooms, or the next at their mean rate, is below `ROOM_LEFT` of the first."""
    if len(rooms) < 2 or rooms[0] == 0:
        return False
    share = rooms[-1] / rooms[0]
    return share * min(share ** (1 / (len(rooms) - 1)), 1) < ROOM_LEFT


def room_left(forget: RetainStatistics, retain: RetainStatistics, constraint: ConstraintLike) -> dict[str, float]:
    """`tr(R G R) / tr(G)` by constrained layer: 1 where the constraint lets all through that the forget rows excite."""
    device = next(iter(retain.gram_sums.values())).device
    with warnings.catch_warnings():  # the trainer has told already
        warnings.simplefilter("ignore")
        bound = bind_constraints(retain, constraint, device)
    shares: dict[tuple[str, int], float] = {}
    room = {}
    for layer, one in bound.items():
        if one.right is None:
            continue
        place = forget.layers[layer].inputs, id(one.right)
        if place not in shares:
            shares[place] = _share_through(one.right, forget, layer, device)
        room[layer] = shares[place]
    return room


def _share_through(right: Factor, forget: RetainStatistics, layer: str, device: torch.device) -> float:
    """`tr(R G R) / tr(G)` of one layer; of a sketch that of the part that it holds."""
    gram_II = forget.gram(layer).to(device)
    if is_sketch(gram_II.shape):
        parts = forget.gram_eigen(layer).to(device)
        root_KI = (parts.vectors_II * parts.values_I.sqrt()).mT.float()
        return (right(root_KI).square().sum() / root_KI.square().sum().clamp(min=1e-30)).item()
    gram_II = (gram_II / gram_II.trace().clamp(min=1e-300)).float()
    return max(right(right(gram_II).T).trace().item(), 0.0)
