"""Collecting: forward passes over a data set, with hooks that sum the second moments of layer inputs.

Shapes: B rows, T positions, N = unmasked positions, I and O features of a layer, L label positions, V classes.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_unlearn.data import default_collator, encode_dataset, own_batches, take
from hf_unlearn.errors import ModelError, SettingsError
from hf_unlearn.fingerprint import row_hashes, rows_to_text, weights_fingerprint
from hf_unlearn.layers import describe_layer, find_layers
from hf_unlearn.predictions import IGNORED, label_positions, output_logits, shifts_labels
from hf_unlearn.sharding import gather, is_main, own_indices, sum_over_processes
from hf_unlearn.statistics import LayerSums, RetainStatistics

MAX_FISHER_SIZE = 1 << 14  # a 16384 x 16384 float64 matrix takes 2 GiB


def collect_statistics(
    model: nn.Module,
    dataset: Any,
    *,
    collator: Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Tensor]] | None = None,
    processing_class: Any = None,
    batch_size: int = 8,
    fisher: bool = False,
    layers: Sequence[str] | None = None,
    max_rows: int | None = None,
    progress: bool = True,
) -> RetainStatistics:
    """Sum `X^T X`, and with `fisher=True` `Y^T Y`, of every linear layer over `dataset`.

    Positions whose attention mask is 0 do not count; labels of -100 do not mask inputs. Layers that see one tensor
    (q, k, v; gate, up) share one Gram. Products and sums are float64. The Fisher's labels are sampled from the model's
    own prediction at the label positions (all unmasked positions where the rows have no labels), with a generator
    seeded by the row's content: the same row gives the same labels in any batch, so that subtraction is exact.

    In a distributed run every process takes its own share of the rows, none twice, and all get the same sums.

    The model runs in eval mode; its mode, `requires_grad` flags and hooks are restored, also on errors.

    Args:
        model: Any model with linear layers; see `layers.describe_layer`.
        dataset: Rows in a format of `data.encode_dataset`, also streamed (`datasets.IterableDataset`), or anything
            that `collator` takes.
        collator: Rows to batch; default pads on the right.
        processing_class: Tokenizer or image processor, needed for raw rows.
        batch_size: Rows a forward pass; it changes the result by rounding only.
        fisher: Also run a backward pass for the Fisher (`KroneckerConstraint`, predicted KL).
        layers: Shell patterns of module names; default `layers.find_layers`.
        max_rows: Stop after this many rows of `dataset`.
        progress: Show a progress bar.

    Raises:
        DataError: Empty data set or unknown row format.
        ModelError: No layer that can be handled, or a Fisher larger than 16384 x 16384.
        SettingsError: `batch_size` or `max_rows` below 1.
    """
    if batch_size < 1 or (max_rows is not None and max_rows < 1):
        raise SettingsError(f"batch_size and max_rows must be at least 1, got {batch_size} and {max_rows}")
    rows = take(encode_dataset(dataset, processing_class, what="statistics", model=model, streams=True), max_rows)
    collector = _Collector(model, find_layers(model, layers), fisher)
    collate = collator or default_collator(processing_class)
    device = next(model.parameters()).device
    quiet = not (progress and is_main())
    total = len(own_indices(len(rows))) if hasattr(rows, "__len__") else None
    with collector.recording(), tqdm(total=total, desc="Collecting", unit="row", disable=quiet) as bar:
        for batch, counted in own_batches(rows, collate, batch_size):
            inputs = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
            bar.update(collector.add(inputs, counted))
    return collector.finish({"fisher": fisher, "layers": layers and list(layers), "max_rows": max_rows})


@contextmanager
def record_inputs(
    layers: Mapping[str, nn.Module], receive: Callable[[str, Tensor], None], outputs: Callable | None = None
) -> Iterator[None]:
    """Call `receive(name, input)` at each forward of each layer, and `outputs(name, output)` after it if given.

    A returned tensor of `outputs` replaces the layer's output. Hooks are removed on exit, also on errors.
    """
    handles = []
    try:
        for name, module in layers.items():
            handles.append(module.register_forward_pre_hook(lambda m, args, name=name: receive(name, args[0])))
            if outputs is not None:
                handles.append(module.register_forward_hook(lambda m, args, out, name=name: outputs(name, out)))
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Collector:
    """The mutable sums behind one `collect_statistics` call."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], fisher: bool):
        self.model, self.layers, self.fisher = model, layers, fisher
        self.sizes = {name: layer for name, module in layers.items() if (layer := describe_layer(module))}
        if fisher:
            _check_fisher_sizes({name: layer.outputs for name, layer in self.sizes.items()})
        self.gram_sums: dict[str, Tensor] = {}
        self.fisher_sums: dict[str, Tensor] = {}
        self.owner: dict[str, str] = {}  # layer -> the layer whose Gram it shares
        self.positions: dict[str, int] = {}
        self.rows = self.labels = self.data = 0
        self._counted = True
        self._mask_BT: Tensor | None = None
        self._last: tuple[weakref.ref, int, str] | None = None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Scope of the collecting: eval mode, frozen parameters, hooks."""
        modes = {module: module.training for module in self.model.modules()}
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        try:
            self.model.eval()
            for parameter in trainable:  # only gradients of activations are needed
                parameter.requires_grad_(False)
            outputs = self._watch_output if self.fisher else None
            with record_inputs(self.layers, self._add_inputs, outputs), torch.set_grad_enabled(self.fisher):
                yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for parameter in trainable:
                parameter.requires_grad_(True)

    def add(self, inputs: Mapping[str, Tensor], counted: bool = True) -> int:
        """Run one batch through the model; returns its number of rows. Not `counted`, it leaves no trace."""
        self._counted = counted
        mask = inputs.get("attention_mask")
        self._mask_BT = mask.bool() if mask is not None and mask.ndim == 2 else None
        self._last = None
        hashes = row_hashes(inputs, self._mask_BT)
        logits = output_logits(self.model, inputs)
        if self.fisher:
            self._backward(logits, inputs, hashes)
        if counted:
            self.rows += len(hashes)
            self.data += sum(hashes)
        return len(hashes)

    def finish(self, settings: dict[str, Any]) -> RetainStatistics:
        missing = [name for name in self.layers if name not in self.owner]
        if missing:
            raise ModelError(f"{missing[0]} (and {len(missing) - 1} more layers) never ran; leave them out of `layers`")
        self._sum_over_processes()
        for name, gram_II in self.gram_sums.items():
            if not torch.isfinite(gram_II).all():
                raise ModelError(
                    f"the inputs of {name} are not finite (NaN or infinite); the weights or rows are broken"
                )
        return RetainStatistics(
            gram_sums=self.gram_sums,
            fisher_sums={name: self.fisher_sums[name] for name in self.layers} if self.fisher else {},
            layers={n: LayerSums(self.owner[n], size.outputs, size.transposed) for n, size in self.sizes.items()},
            positions=self.positions,
            rows=self.rows,
            labels=self.labels,
            weights=weights_fingerprint(self.model),
            data=rows_to_text(self.data),
            settings=settings,
        )

    def _sum_over_processes(self) -> None:
        sum_over_processes(self.gram_sums)
        sum_over_processes(self.fisher_sums)
        counts = {name: torch.tensor(count) for name, count in self.positions.items()}
        totals = {"rows": torch.tensor(self.rows), "labels": torch.tensor(self.labels)}
        sum_over_processes(counts)
        sum_over_processes(totals)
        self.positions = {name: int(count) for name, count in counts.items()}
        self.rows, self.labels, self.data = int(totals["rows"]), int(totals["labels"]), sum(gather(self.data))

    def _unmasked(self, tensor: Tensor) -> Tensor:
        """Rows of a layer's input or output that count: `[B, T, F]`, `[B * T, F]` or `[B, F] -> [N, F]`."""
        mask = self._mask_BT
        if mask is not None and tensor.ndim == 3 and tensor.shape[:2] == mask.shape:
            return tensor[mask]
        if mask is not None and tensor.ndim == 2 and len(tensor) == mask.numel() and mask.shape[1] > 1:
            return tensor[mask.flatten()]
        return tensor.reshape(-1, tensor.shape[-1])

    def _add_inputs(self, name: str, tensor: Tensor) -> None:
        if self._is_shared(name, tensor):
            return
        rows_NI = self._unmasked(tensor.detach()).double()
        size = self.sizes[name].inputs
        if name not in self.gram_sums:
            self.gram_sums[name] = rows_NI.new_zeros(size, size)
            self.positions[name] = 0
        if self._counted:
            self.gram_sums[name].addmm_(rows_NI.t(), rows_NI)
            self.positions[name] += len(rows_NI)

    def _is_shared(self, name: str, tensor: Tensor) -> bool:
        """Whether the layer that ran last saw this very tensor; decided on the first batch, then relied upon."""
        if self._last is not None:
            seen, version, owner = self._last
            same = seen() is tensor and version == tensor._version
        else:
            same, owner = False, name
        owner = self.owner.setdefault(name, owner if same else name)
        if owner != name and not same:
            raise ModelError(
                f"{name} shared its input with {owner} in one batch and not in another; name it in `layers` alone"
            )
        self._last = (weakref.ref(tensor), tensor._version, owner)
        return owner != name

    def _watch_output(self, name: str, output: Tensor) -> Tensor:
        if not output.requires_grad:  # the first layer: everything before it is frozen
            output = output.detach().requires_grad_()
        if name not in self.fisher_sums:  # stays zero where the prediction does not depend on the layer
            size = self.sizes[name].outputs
            self.fisher_sums[name] = torch.zeros(size, size, dtype=torch.float64, device=output.device)
        output.register_hook(lambda gradient: self._add_gradient(name, gradient))
        return output

    def _add_gradient(self, name: str, gradient: Tensor | None) -> None:
        if gradient is None:
            raise ModelError(
                f"no gradient flows back to {name} (4-bit weights on the CPU have none once a pass without gradients "
                "has packed them); collect right after loading, or without fisher"
            )
        if not self._counted:
            return
        rows_NO = self._unmasked(gradient).double()
        self.fisher_sums[name].addmm_(rows_NO.t(), rows_NO)

    def _backward(self, logits: Tensor, inputs: Mapping[str, Tensor], hashes: list[int]) -> None:
        """Backward pass of the summed negative log-likelihood of labels drawn from the model's prediction."""
        mask = label_positions(self.model, _fisher_labels(logits, inputs, self._mask_BT))
        if logits.ndim == 3 and shifts_labels(self.model):
            logits = logits[:, :-1]
        logits_LV = logits[mask].float()
        uniforms_L = torch.cat(
            [_uniforms(seed, n) for seed, n in zip(hashes, mask.reshape(len(mask), -1).sum(1).tolist(), strict=True)]
        )
        sampled_L = sample_labels(logits_LV.detach(), uniforms_L.to(logits.device))
        self.labels += len(sampled_L) if self._counted else 0
        F.cross_entropy(logits_LV, sampled_L, reduction="sum").backward()


def sample_labels(logits_LV: Tensor, uniforms_L: Tensor) -> Tensor:
    """Draw one label per position from `softmax(logits_LV)` by inverting its distribution function at `uniforms_L`."""
    cumulative_LV = logits_LV.double().softmax(-1).cumsum(-1)
    drawn_L1 = torch.searchsorted(cumulative_LV, uniforms_L.double().unsqueeze(1) * cumulative_LV[:, -1:], right=True)
    return drawn_L1.squeeze(1).clamp(max=logits_LV.shape[1] - 1)


def _uniforms(seed: int, count: int) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed % (1 << 63)), dtype=torch.float64)


def _fisher_labels(logits: Tensor, inputs: Mapping[str, Tensor], mask_BT: Tensor | None) -> Tensor:
    """Labels whose -100s say where the model predicts: the batch's own, or all unmasked positions."""
    if "labels" in inputs:
        return inputs["labels"]
    if logits.ndim == 2:
        return torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    labels = torch.zeros(logits.shape[:2], dtype=torch.long, device=logits.device)
    return labels if mask_BT is None else labels.masked_fill(~mask_BT, IGNORED)


def _check_fisher_sizes(outputs: Mapping[str, int]) -> None:
    for name, size in outputs.items():
        if size > MAX_FISHER_SIZE:
            raise ModelError(f"{name} has {size} outputs, its Fisher {size} x {size} entries; leave it out of `layers`")
