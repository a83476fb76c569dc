"""The dual weight of a retain term under a bound (Entesari et al., arXiv 2506.05314)."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from hf_unlearn.core.text import ShortRepr
from hf_unlearn.errors import SettingsError


class DualWeightState(TypedDict):
    """What a resumed run needs of a dual weight."""

    value: float
    pending: list[float]


@dataclass(repr=False)
class DualWeight(ShortRepr):
    """A weight with the update `weight <- max(0, weight + eta (L_r - eps))`; L_r is the mean retain loss of a step.

    The loss adds each micro-batch's share of L_r; `DualWeightCallback` sums the shares over processes and updates.

    >>> weight = DualWeight(value=1.0, eps=0.2, warmup_epochs=0)
    >>> weight.end_step(retain=0.7, epoch=0.5)
    >>> weight.value
    1.5
    """

    value: float
    """The weight; it starts at the loss's alpha. Squared logit margins are large, so 50 to 100 is usual."""
    eps: float
    """Bound on the retain loss, somewhat above its value under the original model. It must be given."""
    eta: float = 1.0
    """Step size of the weight."""
    warmup_epochs: float = 5.0
    """Epochs before the first update."""
    update_upon: Literal["step", "epoch"] = "step"
    """When to update: after each optimizer step, or after each epoch with the mean over its steps."""
    first_value: float = field(init=False)
    pending: list[float] = field(init=False, default_factory=list)
    _share: Tensor | None = field(init=False, default=None)

    @classmethod
    def build(cls, loss: str, alpha: float, settings: Mapping[str, Any]) -> "DualWeight":
        """Build it from the settings of a loss; raise `SettingsError` if one is missing or out of range."""
        if "eps" not in settings:
            raise SettingsError(
                f"loss {loss!r} needs the setting eps, a bound on the retain loss: take somewhat more than the "
                'original model\'s retain loss, such as loss_settings {"eps": 0.2}'
            )
        return cls(alpha, **settings)

    @classmethod
    def setting_names(cls) -> list[str]:
        """Return the names of the settings of a loss with a dual weight; its value starts at alpha."""
        return [f.name for f in fields(cls) if f.init and f.name != "value"]

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
        """Add one micro-batch's share of the step's mean retain loss, a scalar."""
        self._share = share.clone() if self._share is None else self._share + share

    def take(self) -> Tensor:
        """Return and reset the sum of this process's shares since the last step, in float64 on the CPU."""
        share, self._share = self._share, None
        return torch.zeros((), dtype=torch.float64) if share is None else share.double().cpu()

    def end_step(self, retain: float, epoch: float) -> None:
        """Note the end of an optimizer step and update if it is time to.

        Args:
            retain: Mean retain loss of the step over all processes.
            epoch: Epochs since the start of the run.
        """
        self.pending.append(retain)
        if self.update_upon == "step":
            self._update(epoch > self.warmup_epochs)
        elif abs(epoch - round(epoch)) < 1e-6:  # on_epoch_end would come after a checkpoint of this step
            self._update(epoch >= self.warmup_epochs)

    def _update(self, warm: bool) -> None:
        retain = sum(self.pending) / len(self.pending)
        self.pending.clear()
        if warm:
            self.value = max(0.0, self.value + self.eta * (retain - self.eps))

    def reset(self) -> None:
        """Reset to the state at the start of a run."""
        self.value, self._share = self.first_value, None
        self.pending.clear()

    def state(self) -> DualWeightState:
        """Return what a resumed run needs, as JSON values."""
        return {"value": self.value, "pending": list(self.pending)}

    def load_state(self, state: DualWeightState) -> None:
        """Restore what `state` returned."""
        self.value, self.pending, self._share = state["value"], list(state["pending"]), None

    def settings(self) -> dict[str, object]:
        """Return the settings it was built with, for reports."""
        return {name: getattr(self, name) for name in self.setting_names()}
