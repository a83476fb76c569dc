"""A plug-in outside the package: a layer type with a model that uses it, a constraint, a loss, a metric and an attack.

Nothing in `hf_unlearn` names any of them. `--plugin tests/helpers/outside_plugin.py` imports this file.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from hf_unlearn import (
    Constraint,
    Layer,
    Predictions,
    register_attack,
    register_constraint,
    register_layer,
    register_loss,
    register_metric,
)
from hf_unlearn.constraints import Factor, Shrink
from hf_unlearn.evaluation import NUMBER, Estimate, Outcome, Subject, UnlearningMetric, bootstrap, bootstrap_mean
from hf_unlearn.models import restored
from hf_unlearn.statistics import Eigen


class InputMajorLinear(nn.Module):
    """`y = x W` with the weight stored as `[I, O]`; a type that the package does not know."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@register_layer(InputMajorLinear)
def describe_input_major(module: InputMajorLinear) -> Layer:
    """A plain matrix, stored transposed."""
    return Layer(outputs=module.weight.shape[1], inputs=module.weight.shape[0], transposed=True)


class OutsideConfig(PretrainedConfig):
    """Configuration of a two-block language model without attention."""

    model_type = "outside"

    def __init__(self, vocab_size: int = 64, hidden_size: int = 32, **options: Any):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, 2
        super().__init__(**options)


class OutsideForCausalLM(PreTrainedModel, GenerationMixin):
    """Each token is predicted from the one before and the mean of all before."""

    config_class = OutsideConfig
    base_model_prefix = "model"

    def __init__(self, config: OutsideConfig):
        super().__init__(config)
        size = config.hidden_size
        self.embed = nn.Embedding(config.vocab_size, size)
        self.blocks = nn.ModuleList(InputMajorLinear(size, size) for _ in range(2))
        self.lm_head = nn.Linear(size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            nn.init.normal_(parameter, std=0.2)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **options: Any
    ) -> CausalLMOutput:
        hidden = self.embed(input_ids)
        places = torch.arange(1, hidden.shape[1] + 1, device=hidden.device).view(1, -1, 1)
        hidden = hidden + hidden.cumsum(1) / places
        for block in self.blocks:
            hidden = hidden + torch.tanh(block(hidden))
        logits = self.lm_head(hidden)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size)
        return CausalLMOutput(loss=loss, logits=logits)


AutoConfig.register("outside", OutsideConfig, exist_ok=True)
AutoModelForCausalLM.register(OutsideConfig, OutsideForCausalLM, exist_ok=True)


@register_constraint("outside_inverse")
@dataclass(frozen=True)
class InverseConstraint(Constraint):
    """Steps multiplied by the inverse of the Gram plus a share of its mean eigenvalue."""

    share: float = 0.1

    def right(self, gram: Eigen) -> Factor:
        values_I = gram.spectrum_I
        scale_I = self.share * values_I.mean() / (values_I + self.share * values_I.mean())
        return Shrink(((gram.vectors_II.double() * scale_I) @ gram.vectors_II.double().T).float())


@register_loss("outside_confidence")
def confidence(predictions: Predictions, original: None, *, power: float = 1.0) -> Tensor:
    """The probability of each label, to a power."""
    return (-power * predictions.nll_L).exp()


@register_metric("outside_worst_loss")
class WorstLoss(UnlearningMetric):
    """The largest loss of a row, in nats."""

    inputs: ClassVar[dict[str, Any]] = {"loss": NUMBER}

    @staticmethod
    def estimate(loss: np.ndarray, seed: int = 0) -> Estimate:
        return bootstrap([loss], np.max, seed)


@register_attack("outside_shrinking")
def shrinking(subject: Subject) -> Iterator[Outcome]:
    """Halve all weights, and look at the forget rows."""
    with restored(subject.model), torch.no_grad():
        for weight in subject.model.parameters():
            weight.mul_(0.5)
        score_N = subject.score(subject.rows["forget"])
    yield Outcome(f"shrunken_{subject.score_name}", "forget", bootstrap_mean(score_N), memory="more")
