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
"""Warn if the room is below this share of the first request's room, or will be at the next request at this rate."""


def running_out(rooms: Sequence[float]) -> bool:
    """Return whether the last room, or the next one at the mean rate so far, is below `ROOM_LEFT` of the first.

    Args:
        rooms: Room at each request, oldest first.

    >>> running_out([0.4, 0.3]), running_out([0.4, 0.19])
    (False, True)
    """
    if len(rooms) < 2 or rooms[0] == 0:
        return False
    share = rooms[-1] / rooms[0]
    return share * min(share ** (1 / (len(rooms) - 1)), 1) < ROOM_LEFT


def room_left(forget: RetainStatistics, retain: RetainStatistics, constraint: ConstraintLike) -> dict[str, float]:
    """Return `tr(R G R) / tr(G)` for each constrained layer.

    G is the Gram matrix of the forget rows, and R the right factor of the constraint. 1 means that the constraint lets
    everything through that the forget rows excite.

    Args:
        forget: Statistics of the forget rows.
        retain: Statistics that the constraint is bound to.
        constraint: The constraint, or constraints by layer pattern.
    """
    device = next(iter(retain.gram_sums.values())).device
    with warnings.catch_warnings():  # the trainer has issued them already
        warnings.simplefilter("ignore")
        bound = bind_constraints(retain, constraint, device)
    share_by_gram_and_factor: dict[tuple[str, int], float] = {}
    room = {}
    for layer, bound_constraint in bound.items():
        factor = bound_constraint.right
        if factor is None:
            continue
        key = forget.layers[layer].inputs, id(factor)
        if key not in share_by_gram_and_factor:
            share_by_gram_and_factor[key] = _share_through(factor, forget, layer, device)
        room[layer] = share_by_gram_and_factor[key]
    return room


def _share_through(right: Factor, forget: RetainStatistics, layer: str, device: torch.device) -> float:
    """Return `tr(R G R) / tr(G)` of one layer; for a sketch, of the part that the sketch holds."""
    gram_II = forget.gram(layer).to(device)
    if is_sketch(gram_II.shape):
        eigen = forget.gram_eigen(layer).to(device)
        root_KI = (eigen.vectors_II * eigen.values_I.sqrt()).mT.float()
        return (right(root_KI).square().sum() / root_KI.square().sum().clamp(min=1e-30)).item()
    gram_II = (gram_II / gram_II.trace().clamp(min=1e-300)).float()
    return max(right(right(gram_II).T).trace().item(), 0.0)
