"""Predicted effect of a move on the retain data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Drift:
    """Predicted effect of the whole move from the original weights on the retain data, from the statistics alone.

    Attributes:
        by_layer: Relative change of each layer's outputs: `sqrt(tr(D gram D^T) / tr(W_0 gram W_0^T))`.
        kl: `1/2 sum tr(fisher D gram D^T)`, in nats per label; None without a Fisher.
    """

    by_layer: dict[str, float]
    kl: float | None

    @property
    def relative(self) -> float:
        """Root mean square over layers of the relative output change."""
        squares = [value**2 for value in self.by_layer.values()]
        return (sum(squares) / len(squares)) ** 0.5 if squares else 0.0
