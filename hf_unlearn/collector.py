"""The sums behind `collect_statistics`: hooks on layers, products of what they see, one pass for each group of layers.

Shapes: B rows, T positions, N unmasked positions, I and O features of a layer, F either, L label positions, V classes.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_unlearn.errors import ModelError, SettingsError
from hf_unlearn.fingerprint import row_hashes, rows_to_text, weights_fingerprint
from hf_unlearn.layers import describe_layer
from hf_unlearn.linalg import add_products, mirror
from hf_unlearn.predictions import IGNORED, label_positions, output_logits, shifts_labels
from hf_unlearn.sharding import gather, gather_rows, sum_over_processes, world
from hf_unlearn.statistics import LayerSums, RetainStatistics
from hf_unlearn.storage import Storage, from_own_rows, own_rows

MAX_FISHER_SIZE = 1 << 14  # a 16384 x 16384 float64 matrix takes 2 GiB


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


class Collector:
    """The mutable sums behind one `collect_statistics` call: one pass over the data for each group of layers."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Module], fisher: bool, storage: Storage):
        self.model, self.layers, self.fisher, self.storage = model, layers, fisher, storage
        self.sizes = {name: layer for name, module in layers.items() if (layer := describe_layer(module))}
        if fisher:
            _check_fisher_sizes({name: layer.outputs for name, layer in self.sizes.items()})
        self.gram_sums: dict[str, Tensor] = {}
        self.fisher_sums: dict[str, Tensor] = {}
        self.owner: dict[str, str] = {}  # layer -> the layer whose Gram it shares
        self.positions: dict[str, int] = {}
        self.rows = self.labels = self.data = 0
        self._in_shards = storage.place == "shards" and world()[1] > 1
        self._counted = self._summing = True
        self._complete_groups = 0
        self._mask_BT: Tensor | None = None
        self._last: tuple[weakref.ref, int, str] | None = None

    @contextmanager
    def recording(self, names: Sequence[str]) -> Iterator[None]:
        """Scope of one pass: eval mode, frozen parameters, hooks on the layers of these names.

        At its end their sums are complete, over all processes, and in the place where statistics are kept.
        """
        modes = {module: module.training for module in self.model.modules()}
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        gradients = [p.grad for p in trainable]
        outputs = self._watch_output if self.fisher and self._summing else None
        hooked = {name: self.layers[name] for name in names}
        try:
            self.model.eval()
            for parameter in trainable:  # only gradients of activations are needed
                parameter.requires_grad_(False)
            with record_inputs(hooked, self._add_inputs, outputs), torch.set_grad_enabled(outputs is not None):
                yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for parameter, gradient in zip(trainable, gradients, strict=True):
                parameter.requires_grad_(True)
                parameter.grad = gradient  # weights that FSDP has sharded get one all the same
        if self._summing:
            self._complete(names)

    def groups(self, first: Callable[[], Mapping[str, Tensor]], max_memory: int | None) -> list[list[str]]:
        """The layers in groups whose unfinished sums take at most `max_memory` bytes on this process, in order.

        Raises:
            SettingsError: Layers that share one input take more.
        """
        if max_memory is None:
            return [list(self.layers)]
        self._summing = False  # a first look at which layers share their input
        try:
            with self.recording(list(self.layers)):
                self.add(first(), counted=False)
        finally:
            self._summing = True
        sizes: dict[str, int] = {}
        for name in self.layers:
            owner = self.owner.get(name, name)
            sizes[owner] = sizes.get(owner, self._bytes(self.sizes[owner].inputs))
            sizes[owner] += self._bytes(self.sizes[name].outputs) if self.fisher else 0
        found: list[list[str]] = []
        room = 0
        for owner, size in sizes.items():
            if size > max_memory:
                raise SettingsError(f"the sums of {owner} take {size} bytes, above max_memory {max_memory}; raise it")
            if not found or size > room:
                found.append([])
                room = max_memory
            found[-1] += [name for name in self.layers if self.owner.get(name, name) == owner]
            room -= size
        return found

    def _bytes(self, size: int) -> int:
        return 8 * size * len(range(size)[own_rows(size)] if self._in_shards else range(size))

    def add(self, inputs: Mapping[str, Tensor], counted: bool = True) -> int:
        """Run one batch through the model; returns its number of rows. Not `counted`, it leaves no trace."""
        self._counted = counted
        mask = inputs.get("attention_mask")
        self._mask_BT = mask.bool() if mask is not None and mask.ndim == 2 else None
        self._last = None
        hashes = row_hashes(inputs, self._mask_BT)
        logits = output_logits(self.model, inputs)
        if self.fisher and self._summing:
            self._backward(logits, inputs, hashes)
        if counted and not self._complete_groups:
            self.rows += len(hashes)
            self.data += sum(hashes)
        return len(hashes)

    def finish(self, settings: dict[str, Any]) -> RetainStatistics:
        missing = [name for name in self.layers if name not in self.owner]
        if missing:
            raise ModelError(f"{missing[0]} (and {len(missing) - 1} more layers) never ran; leave them out of `layers`")
        totals = {"rows": torch.tensor(self.rows), "labels": torch.tensor(self.labels)}
        sum_over_processes(totals)
        return RetainStatistics(
            gram_sums=self.gram_sums,
            fisher_sums={name: self.fisher_sums[name] for name in self.layers} if self.fisher else {},
            layers={n: LayerSums(self.owner[n], size.outputs, size.transposed) for n, size in self.sizes.items()},
            positions=self.positions,
            rows=int(totals["rows"]),
            labels=int(totals["labels"]),
            weights=weights_fingerprint(self.model),
            data=rows_to_text(sum(gather(self.data))),
            settings=settings,
            storage=self.storage,
        )

    def _complete(self, names: Sequence[str]) -> None:
        """Sum over the processes what the pass over the layers `names` has found, and put it where it is kept."""
        self._complete_groups += 1
        for sums in (self.gram_sums, self.fisher_sums):
            for name in (name for name in names if name in sums):
                if not self._in_shards:
                    mirror(sums[name])
                    sum_over_processes({name: sums[name]})
                if not torch.isfinite(sums[name]).all():
                    raise ModelError(
                        f"what {name} computes is not finite (NaN or infinite); weights or rows are broken"
                    )
                size = sums[name].shape[1]
                sums[name] = from_own_rows(sums[name], size) if self._in_shards else self.storage.keep(sums[name])
        counts = {name: torch.tensor(self.positions[name]) for name in names if name in self.positions}
        sum_over_processes(counts)
        self.positions |= {name: int(count) for name, count in counts.items()}

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
        if not self._summing:
            return
        rows_NI = self._unmasked(tensor.detach())
        self.positions.setdefault(name, 0)
        self.positions[name] += len(rows_NI) if self._counted else 0
        self._add_products(self.gram_sums, name, rows_NI, self.sizes[name].inputs)

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
        self._sums_of(self.fisher_sums, name, self.sizes[name].outputs, output.device)  # zero where no gradient comes
        output.register_hook(lambda gradient: self._add_gradient(name, gradient))
        return output

    def _add_gradient(self, name: str, gradient: Tensor | None) -> None:
        if gradient is None:
            raise ModelError(
                f"no gradient flows back to {name} (4-bit weights on the CPU have none once a pass without gradients "
                "has packed them); collect right after loading, or without fisher"
            )
        self._add_products(self.fisher_sums, name, self._unmasked(gradient), self.sizes[name].outputs)

    def _sums_of(self, sums: dict[str, Tensor], name: str, size: int, device: torch.device) -> Tensor:
        if name not in sums:
            rows = len(range(size)[own_rows(size)]) if self._in_shards else size
            sums[name] = torch.zeros(rows, size, dtype=torch.float64, device=device)
        return sums[name]

    def _add_products(self, sums: dict[str, Tensor], name: str, rows_NF: Tensor, size: int) -> None:
        """Add `rows^T rows`; of sums in shards this process's rows of it, from the rows of all processes."""
        own_sums = self._sums_of(sums, name, size, rows_NF.device)
        if not self._counted:
            rows_NF = rows_NF[:0]
        if self._in_shards:
            rows_NF = gather_rows(rows_NF).double()
            own_sums.addmm_(rows_NF[:, own_rows(size)].t(), rows_NF)
        elif len(rows_NF):
            add_products(own_sums, rows_NF.double())

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
        self.labels += len(sampled_L) if self._counted and not self._complete_groups else 0
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
