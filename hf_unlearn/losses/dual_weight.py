"""The dual weight of a retain term under a bound (Entesari et al., arXiv 2506.05314)."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor

from hf_unlearn.errors import SettingsError


@dataclass
class DualWeight:
    """`weight <- max(0, weight + eta (L_r - eps))`, L_r the mean retain loss of an optimizer step.

    The loss adds each micro-batch's share; `DualWeightCallback` sums the shares over processes and updates.
    """

    value: float
    """The weight, at first the loss's alpha; squared logit margins are large, so that 50 to 100 is usual."""
    eps: float
    """Bound on the retain loss, somewhat above its value under the original model. It has no default."""
    eta: float = 1.0
    """Step size of the weight."""
    warmup_epochs: float = 5.0
    """Epochs before the first update."""
    update_upon: Literal["step", "epoch"] = "step"
    """Update after each optimizer step, or after each epoch by the mean over its steps."""
    first_value: float = field(init=False)
    pending: list[float] = field(init=False, default_factory=list)
    _share: Tensor | None = field(init=False, default=None)

    @classmethod
    def build(cls, loss: str, alpha: float, settings: Mapping[str, Any]) -> "DualWeight":
        """With the settings of a loss; raises `SettingsError` where one is missing or out of range."""
        if "eps" not in settings:
            raise SettingsError(
                f"loss {loss!r} needs the setting eps, a bound on the retain loss: take somewhat more than what the "
                'original model has, such as loss_settings {"eps": 0.2}'
            )
        return cls(alpha, **settings)

    def __post_init__(self) -> None:
        if self.update_upon not in ("step", "epoch"):
            raise SettingsError(f"update_upon must be step or epoch, got {self.update_upon!r}")
        for name in ("value", "eta", "warmup_epochs"):
            if not getattr(self, name) >= 0:
                raise SettingsError(
                    f"{name if name != 'value' else 'alpha'} must be at least 0, got {getattr(self, name)}"
                )
        self.first_value = self.value

    def add(self, share: Tensor) -> None:
        """Note one micro-batch's share of the step's mean retain loss, a scalar."""
        self._share = share.clone() if self._share is None else self._share + share

    def take(self) -> Tensor:
        """The sum of the shares since the last step, of this process alone, in float64 on the CPU."""
        share, self._share = self._share, None
        return torch.zeros((), dtype=torch.float64) if share is None else share.double().cpu()

    def end_step(self, retain: float, epoch: float) -> None:
        """An optimizer step has ended, `epoch` epochs into the run, with this mean retain loss over all processes."""
        self.pending.append(retain)
        if self.update_upon == "step":
            self._update(epoch > self.warmup_epochs)
        elif abs(epoch - round(epoch)) < 1e-6:  # not at on_epoch_end, which comes after a checkpoint of this step
            self._update(epoch >= self.warmup_epochs)

    def _update(self, warm: bool) -> None:
        retain = sum(self.pending) / len(self.pending)
        self.pending.clear()
        if warm:
            self.value = max(0.0, self.value + self.eta * (retain - self.eps))

    def reset(self) -> None:
        """Back to the start of a run."""
        self.value, self._share = self.first_value, None
        self.pending.clear()

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, as JSON."""
        return {"value": self.value, "pending": list(self.pending)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.value, self.pending, self._share = state["value"], list(state["pending"]), None

    def settings(self) -> dict[str, Any]:
        """The settings it was built with, for reports."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init and f.name != "value"}
