"""Sizes of a model, and the memory and operations of one batch of collecting and one of training.

The model has no weights: the batches run on fake tensors, which have shapes but no values.

Shapes: B rows, T positions, N = B * T, I and O features of a layer, V classes or vocabulary entries.
"""

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from hf_unlearn.core.storage import Storage
from hf_unlearn.core.text import one_line
from hf_unlearn.errors import ModelError, SettingsError
from hf_unlearn.estimate.sizes import LayerSize, Trace
from hf_unlearn.losses import UnlearningLoss
from hf_unlearn.models.adapters import layer_of, with_adapter
from hf_unlearn.models.forward import Predictions, output_logits
from hf_unlearn.models.layers import find_layers
from hf_unlearn.models.loading import MODELS
from hf_unlearn.models.tasks import Task, context_length, shifts_labels
from hf_unlearn.models.trainable import freeze_unprotected
from hf_unlearn.statistics.accumulator import Accumulator
from hf_unlearn.statistics.fisher import sample_labels

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PretrainedConfig, PreTrainedModel


class Meter(TorchDispatchMode):
    """Count the bytes of the tensors created inside the context that are alive, their peak, and attention operations.

    Attention kernels that torch's own counter omits are counted as it counts the others: `2 * 2 * B T T D` forward,
    two and a half times that backward.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.gradients = self.activations = 0
        self.attention = 0.0
        self._seen: dict[int, weakref.finalize] = {}

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: tuple = (), kwargs: dict | None = None
    ) -> object:
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        outputs = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in inputs:
                self._add(storage)  # neither a view nor written in place
        name = func.__name__
        if "flash_attention_for_cpu" in name:
            query, key = (args[1], args[2]) if "backward" in name else (args[0], args[1])
            products = 4.0 * query.numel() * key.shape[-2]
            self.attention += 2.5 * products if "backward" in name else products
        return outputs

    def _add(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self._seen:
            return
        size = storage.nbytes()
        self._seen[address] = weakref.finalize(storage, self._forget, address, size)
        self.now += size
        self.peak = max(self.peak, self.now)
        self.activations = max(self.activations, self.now - self.gradients)

    def count_gradient(self, parameter: Tensor) -> None:
        """Count the gradient of `parameter`; a post-accumulate-grad hook."""
        self.gradients += parameter.numel() * parameter.element_size()

    def _forget(self, address: int, size: int) -> None:
        self.now -= size
        self._seen.pop(address, None)


def trace_model(
    config: "PretrainedConfig",
    task: Task,
    loss: UnlearningLoss,
    *,
    batch_size: int,
    length: int,
    dtype: torch.dtype = torch.float32,
    fisher: bool = False,
    gradient_checkpointing: bool = False,
    peft_config: "PeftConfig | None" = None,
) -> Trace:
    """Run one batch of full-length rows through collecting and training, on tensors without values.

    The code that collects is traced itself, so all that it holds is counted, for every layer type.

    >>> from transformers import LlamaConfig
    >>> from hf_unlearn import build_loss
    >>> config = LlamaConfig(
    ...     vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    ... )
    >>> trace = trace_model(config, "language-model", build_loss("ce_u"), batch_size=2, length=8)
    >>> len(trace.layers), len(trace.grams)  # q, k and v share their inputs, as do gate and up
    (7, 4)

    Args:
        config: Configuration of the model; no weights are read.
        task: Task of the model.
        loss: Forget loss of the training batch.
        batch_size: Rows B of a batch.
        length: Tokens T of a row.
        dtype: Precision of the weights.
        fisher: Whether to collect Fishers.
        gradient_checkpointing: Whether to recompute activations in the backward pass.
        peft_config: Adapter to train instead of the weights.

    Raises:
        ModelError: The configuration has no model for this task, or one whose passes depend on values.
        SettingsError: Rows are longer than the model's context, or the model does not support a setting.
    """
    try:
        with torch.device("meta"):
            model = trained = MODELS[task].from_config(config, dtype=dtype)
            if peft_config is not None:
                trained = with_adapter(MODELS[task].from_config(config, dtype=dtype), peft_config)
    except (ValueError, TypeError, KeyError) as error:
        reason = one_line(error, 160)
        raise ModelError(f"{config.model_type!r} has no model of task {task} (--task): {reason}") from error
    if (context := context_length(model)) is not None and length > context:
        raise SettingsError(f"rows of {length} tokens are longer than the context of {context}; lower --max_length")
    try:
        with FakeTensorMode():
            _fill(model)
            if trained is not model:
                _fill(trained)
            return _trace(model, trained, config, loss, batch_size, length, fisher, gradient_checkpointing)
    except (torch._subclasses.fake_tensor.DataDependentOutputException, NotImplementedError) as error:
        raise ModelError(
            f"a {config.model_type!r} model cannot be estimated: its computation depends on values; run it instead"
        ) from error


def _fill(model: nn.Module) -> None:
    """Give parameters and buffers storage without values; tied parameters stay tied."""
    filled: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = torch.empty(parameter.shape, dtype=parameter.dtype)
                new = nn.Parameter(empty, requires_grad=parameter.requires_grad)
                module._parameters[name] = filled.setdefault(id(parameter), new)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _trace(
    base: "PreTrainedModel",
    model: "PreTrainedModel",
    config: "PretrainedConfig",
    loss: UnlearningLoss,
    batch_size: int,
    length: int,
    fisher: bool,
    checkpointing: bool,
) -> Trace:
    tensors = [*base.parameters(), *base.buffers()]
    weights = sum(t.numel() * t.element_size() for t in tensors)
    inputs = _inputs(config, batch_size, length)
    collector, collecting, collected = _collect(base, inputs, fisher)
    unsharded = _unsharded(base)
    freeze_unprotected(model, collector.layers)
    if checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", True):
            raise SettingsError(
                f"{type(model).__name__} has no gradient checkpointing; leave out --gradient_checkpointing"
            )
        options = {"use_reentrant": False, "preserve_rng_state": False}
        cast("PreTrainedModel", model).gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    meter, forward, backward = _train(model, inputs, loss)
    trained = [p for p in model.parameters() if p.requires_grad]
    owners = {layer_of(name)[0] for name, p in model.named_parameters() if p.requires_grad}
    gram_of = collector.shared_inputs.gram_of
    layers = {
        name: LayerSize(size.outputs, size.inputs, gram_of[name], size.transposed, name in owners)
        for name, size in collector.sizes.items()
    }
    return Trace(
        parameters=sum(t.numel() for t in tensors if isinstance(t, nn.Parameter)),
        weights=weights,
        largest=max(t.numel() * t.element_size() for t in tensors),
        layers=layers,
        trained=[p.shape for p in trained],
        width=trained[0].element_size(),
        positions=dict(collector.positions),
        unsharded=unsharded,
        collecting=collecting,
        training=meter.peak,
        activations=meter.activations,
        forward=forward,
        backward=backward,
        collected=collected,
    )


def _inputs(config: "PretrainedConfig", batch_size: int, length: int) -> dict[str, Tensor]:
    if hasattr(config, "image_size") and hasattr(config, "num_channels"):
        size = config.image_size
        sides = (size, size) if isinstance(size, int) else tuple(size)
        return {"pixel_values": torch.empty(batch_size, config.num_channels, *sides)}
    inputs = {"input_ids": torch.zeros(batch_size, length, dtype=torch.long)}
    if getattr(config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = inputs["input_ids"]
    return inputs


class _Sizes(Accumulator):
    """An `Accumulator` of tensors without values, so there is nothing to check or to send at the end."""

    def complete(self, names: Sequence[str]) -> None:
        pass

    @staticmethod
    def unmasked(tensor: Tensor, mask: Tensor | None, blocks: int = 1) -> Tensor:
        if blocks > 1:
            return tensor.reshape(-1, *tensor.shape[-2:]).transpose(0, 1).clone()
        return tensor.reshape(-1, tensor.shape[-1]).clone()  # a mask copies the rows


def _collect(model: "PreTrainedModel", inputs: Mapping[str, Tensor], fisher: bool) -> tuple[Accumulator, int, float]:
    """Trace the second batch of a collecting pass, whose sums exist already."""
    collector = _Sizes(model, find_layers(model), fisher, Storage())

    def batch() -> None:
        collector.shared_inputs.start_batch()
        logits = output_logits(model, inputs)
        if fisher:
            logits_LV = _labelled(logits, model).float()
            labels_L = sample_labels(logits_LV.detach(), torch.empty(len(logits_LV)))
            F.cross_entropy(logits_LV, labels_L, reduction="sum").backward()

    with collector.recording(list(collector.layers)):
        batch()
        collector.positions = dict.fromkeys(collector.positions, 0)
        meter = Meter()
        with FlopCounterMode(display=False) as counter, meter:
            batch()
    return collector, meter.peak, counter.get_total_flops() + meter.attention


def _train(model: nn.Module, inputs: Mapping[str, Tensor], loss: UnlearningLoss) -> tuple[Meter, float, float]:
    """Trace the forward and backward pass of the forget term; every position has a label, gradients are kept."""
    if loss.kind.reads_hidden:
        raise SettingsError(f"loss {loss.name!r} reads a layer's outputs, which is not estimated; use --loss ce_u")
    model.train()
    meter = Meter()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(meter.count_gradient)
    with FlopCounterMode(display=False) as counter, meter:
        reference = None
        if loss.kind.reads_original or loss.kind.reads_reference:
            with torch.no_grad():
                reference = _predictions(model, inputs, loss)
        value = loss.kind.term(_predictions(model, inputs, loss), reference, **loss.settings).sum()
        forward, attention = float(counter.get_total_flops()), meter.attention
        value.backward()
    total = counter.get_total_flops()
    return meter, forward + attention, total - forward + meter.attention - attention


def _predictions(model: nn.Module, inputs: Mapping[str, Tensor], loss: UnlearningLoss) -> Predictions:
    predictions = _predict(model, inputs)
    return replace(predictions, alternate=_predict(model, inputs)) if loss.kind.alternate_answer else predictions


def _predict(model: nn.Module, inputs: Mapping[str, Tensor]) -> Predictions:
    logits = output_logits(model, inputs)
    logits_LV = _labelled(logits, model)
    zeros_L = torch.zeros(len(logits_LV), dtype=torch.long)
    return Predictions(logits_LV, zeros_L, zeros_L.clone(), len(logits), inputs=inputs)


def _labelled(logits: Tensor, model: nn.Module) -> Tensor:
    """Return the logits at the label positions; they are read by indices, as a mask reads them."""
    if logits.ndim == 2:
        return logits[torch.arange(len(logits))]
    if shifts_labels(model):
        logits = logits[:, :-1]
    rows, positions = logits.shape[:2]
    positions_L = torch.arange(positions).repeat(rows)
    return logits[torch.arange(rows).repeat_interleave(positions, output_size=rows * positions), positions_L]


def _unsharded(model: nn.Module) -> int:
    """Return the bytes that FSDP2 has gathered: parameters outside the blocks for a complete pass, and two blocks.

    Parameters outside the blocks are embeddings and the head. The two blocks are the current and the next one.
    """
    blocks = set(getattr(model, "_no_split_modules", None) or ())

    def size(module: nn.Module) -> int:
        return sum(p.numel() * p.element_size() for p in module.parameters())

    sizes = [size(module) for module in model.modules() if type(module).__name__ in blocks]
    return max(size(model) - sum(sizes), 0) + 2 * max(sizes, default=0)
