"""The sums behind `collect_statistics`: hooks on layers, products of what they see, one pass for each group of layers.

Shapes: B rows, T positions, N unmasked positions, I and O features of a layer, F either, L label positions, V classes.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_unlearn.core.processes import gather, gather_rows, sum_over_processes, world
from hf_unlearn.core.sharding import whole
from hf_unlearn.core.storage import Storage, from_own_rows, own_rows
from hf_unlearn.data.row_identity import pair_hashes, row_hashes, rows_to_text
from hf_unlearn.errors import ModelError, SettingsError
from hf_unlearn.models.adapters import without_wrapper
from hf_unlearn.models.fingerprint import weights_fingerprint
from hf_unlearn.models.forward import decoder_mask, label_positions, output_logits
from hf_unlearn.models.layers import BlockRows, layer_at
from hf_unlearn.models.modes import eval_mode
from hf_unlearn.models.tasks import shifts_labels
from hf_unlearn.statistics.eigen import add_products, mirror
from hf_unlearn.statistics.fisher import check_fisher_sizes, fisher_labels, row_uniforms, sample_labels
from hf_unlearn.statistics.hooks import record_inputs
from hf_unlearn.statistics.retain_statistics import LayerSums, RetainStatistics
from hf_unlearn.statistics.sketch import EXACT, Sketching, add_sketch, is_sketch


class Accumulator:
    """The mutable sums behind one `collect_statistics` call: one pass over the data for each group of layers."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, nn.Module],
        fisher: bool,
        storage: Storage,
        sketching: Sketching = EXACT,
    ):
        self.model, self.layers, self.fisher, self.storage = model, layers, fisher, storage
        self.sizes = {name: layer_at(name, module) for name, module in layers.items()}
        self.gram_shapes = {name: sketching.shape(layer.gram_shape) for name, layer in self.sizes.items()}
        self.fisher_shapes = {name: sketching.shape(layer.fisher_shape) for name, layer in self.sizes.items()}
        if fisher:
            check_fisher_sizes(self.fisher_shapes)
        self.gram_sums: dict[str, Tensor] = {}
        self.fisher_sums: dict[str, Tensor] = {}
        self.owner: dict[str, str] = {}  # layer -> the layer whose Gram it shares
        self.positions: dict[str, int] = {}
        self.rows = self.labels = self.data = 0
        self._in_shards = storage.place == "shards" and world()[1] > 1
        if self._in_shards and (odd := [name for name, layer in self.sizes.items() if not layer.plain]):
            raise ModelError(
                f"{odd[0]} is not a plain linear layer, and its sums cannot be in shards; keep them on the device, "
                "the cpu or the disk, or leave it out of `layers`"
            )
        self._counted = self._summing = True
        self._input_masks: dict[str, Tensor | None] = {}
        self._decoder_mask_BT: Tensor | None = None
        self._complete_groups = 0
        self._mask_BT: Tensor | None = None
        self._encoded: Tensor | None = None  # what an encoder-decoder's encoder has returned, and its mask
        self._encoder_mask_BS: Tensor | None = None
        self._last: tuple[weakref.ref, int, str] | None = None

    @contextmanager
    def recording(self, names: Sequence[str]) -> Iterator[None]:
        """Scope of one pass: eval mode, frozen parameters, hooks on the layers of these names.

        At its end their sums are complete, over all processes, and in the place where statistics are kept.
        """
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        gradients = [p.grad for p in trainable]
        outputs = self._watch_output if self.fisher and self._summing else None
        hooked = {name: self.layers[name] for name in names}
        try:
            for parameter in trainable:  # only gradients of activations are needed
                parameter.requires_grad_(False)
            recording = record_inputs(hooked, self._add_inputs, outputs)
            with eval_mode(self.model), torch.set_grad_enabled(outputs is not None), recording:
                with self._following_encoder():
                    yield
        finally:
            for parameter, gradient in zip(trainable, gradients, strict=True):
                parameter.requires_grad_(True)
                parameter.grad = gradient  # weights that FSDP has sharded get one all the same
        if self._summing:
            self._complete(names)

    @contextmanager
    def _following_encoder(self) -> Iterator[None]:
        """Tell an encoder's positions from a decoder's: by time, and cross-attention's inputs as its very output."""
        if not getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            yield
            return

        def enter(*ignored: Any) -> None:
            self._decoder_mask_BT, self._mask_BT = self._mask_BT, self._encoder_mask_BS

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._encoded, self._mask_BT = output[0], self._decoder_mask_BT

        model: Any = without_wrapper(self.model)
        handles = [model.get_encoder().register_forward_pre_hook(enter)]
        handles.append(model.get_encoder().register_forward_hook(leave))
        try:
            yield
        finally:
            self._encoded = None
            for handle in handles:
                handle.remove()

    def _mask_of(self, tensor: Tensor) -> Tensor | None:
        """The mask of a layer's input: of the encoder's output, which cross-attention reads, it is the encoder's."""
        return self._encoder_mask_BS if tensor is self._encoded else self._mask_BT

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
            sizes[owner] = sizes.get(owner, self._bytes(self.gram_shapes[owner]))
            sizes[owner] += self._bytes(self.fisher_shapes[name]) if self.fisher else 0
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

    def _bytes(self, shape: tuple[int, ...]) -> int:
        rows = shape[0]
        return 8 * prod(shape[1:]) * len(range(rows)[own_rows(rows)] if self._in_shards else range(rows))

    def add(self, inputs: Mapping[str, Tensor], counted: bool = True) -> int:
        """Run one batch through the model; returns its number of rows. Not `counted`, it leaves no trace."""
        self._counted = counted
        mask = inputs.get("attention_mask")
        self._mask_BT = mask.bool() if mask is not None and mask.ndim == 2 else None
        self._last = self._encoded = None
        self._batch_size = len(next(iter(inputs.values())))
        hashes = row_hashes(inputs, self._mask_BT)
        if getattr(getattr(self.model, "config", None), "is_encoder_decoder", False):
            self._encoder_mask_BS, self._mask_BT = self._mask_BT, decoder_mask(inputs)
            hashes = pair_hashes(inputs, self._encoder_mask_BS, self._mask_BT)
        logits = output_logits(self.model, inputs)
        if self.fisher and self._summing:
            self._backward(logits, inputs, hashes)
        if counted and not self._complete_groups:
            self.rows += len(hashes)
            self.data += sum(hashes)
        return len(hashes)

    def grams_so_far(self) -> Iterator[tuple[str, Tensor]]:
        """The sums of each Gram that is a matrix over what all processes have seen up to now, one after the other."""
        for name, sums in self.gram_sums.items():
            if sums.ndim == 1:
                continue
            if self._in_shards:
                yield name, whole(from_own_rows(sums, self.gram_shapes[name][0]))
                continue
            total = sums.clone()
            for total_FF in _matrices(total):
                mirror(total_FF)
            sum_over_processes({name: total})
            yield name, total

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
                    for total_FF in _matrices(sums[name]):
                        mirror(total_FF)
                    sum_over_processes({name: sums[name]})
                if not torch.isfinite(sums[name]).all():
                    raise ModelError(
                        f"what {name} computes is not finite (NaN or infinite); weights or rows are broken"
                    )
                size = self._shapes(sums)[name][0]
                sums[name] = from_own_rows(sums[name], size) if self._in_shards else self.storage.keep(sums[name])
        counts = {name: torch.tensor(self.positions[name]) for name in names if name in self.positions}
        sum_over_processes(counts)
        self.positions |= {name: int(count) for name, count in counts.items()}

    @staticmethod
    def _unmasked(tensor: Tensor, mask: Tensor | None, blocks: int = 1) -> Tensor:
        """Rows of a layer's input or output that count: `[B, T, F]`, `[B * T, F]` or `[B, F] -> [N, F]`.

        Of several blocks `[..., G, F] -> [G, N, F]`.
        """
        row = tensor.shape[-1:] if blocks == 1 else tensor.shape[-2:]
        leading = tensor.shape[: tensor.ndim - len(row)]
        if mask is not None and leading == mask.shape:
            rows = tensor[mask]
        elif mask is not None and len(leading) == 1 and leading[0] == mask.numel() and mask.shape[1] > 1:
            rows = tensor[mask.flatten()]
        else:
            rows = tensor.reshape(-1, *row)
        return rows if blocks == 1 else rows.transpose(0, 1)

    def _add_inputs(self, name: str, tensor: Tensor, *arguments: Any) -> None:
        layer = self.sizes[name]
        self._input_masks[name] = self._mask_of(tensor)
        if layer.rows is not None:  # its rows are its own, even if another layer saw the same tensor
            self.owner.setdefault(name, name)
            self._last = None
        elif self._is_shared(name, tensor):
            return
        if not self._summing:
            return
        with torch.no_grad():
            rows: Any = tensor.detach() if layer.rows is None else layer.rows(tensor.detach(), *arguments)
        mask = self._mask_of(tensor)
        if isinstance(rows, Tensor):
            rows = self._unmasked(self._of_each_row(rows) if layer.diagonal else rows, mask, layer.blocks)
        else:
            rows = self._unmasked_blocks(rows, mask)
        count = sum(map(len, rows)) if layer.blocks > 1 else len(rows)
        self.positions.setdefault(name, 0)
        self.positions[name] += count if self._counted else 0
        self._add_products(self.gram_sums, name, rows)

    @staticmethod
    def _unmasked_blocks(blocks: BlockRows, mask: Tensor | None) -> list[Tensor]:
        if mask is None or mask.shape[1] == 1:
            return [rows_NI for rows_NI, _ in blocks]
        mask_N = mask.flatten()
        return [rows_NI[mask_N[positions_N]] for rows_NI, positions_N in blocks]

    def _of_each_row(self, indices: Tensor) -> Tensor:
        """Indices that stand for all rows of the batch (`[1, T, 1]` or `[T, 1]`, of positions) written out for each."""
        return (
            indices.expand(self._batch_size, *indices.shape[-2:]) if indices.ndim == 2 or len(indices) == 1 else indices
        )

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
            output = output.detach().requires_grad_().clone()  # no leaf: an activation may work in place
        self._sums_of(self.fisher_sums, name, output.device)  # zero where no gradient comes
        mask = self._input_masks[name]
        output.register_hook(lambda gradient: self._add_gradient(name, gradient, mask))
        return output

    def _add_gradient(self, name: str, gradient: Tensor | None, mask: Tensor | None) -> None:
        if gradient is None:
            raise ModelError(
                f"no gradient flows back to {name} (4-bit weights on the CPU have none once a pass without gradients "
                "has packed them); collect right after loading, or without fisher"
            )
        layer = self.sizes[name]
        rows = self._unmasked(
            gradient if layer.output_rows is None else layer.output_rows(gradient), mask, layer.blocks
        )
        self._add_products(self.fisher_sums, name, rows)

    def _shapes(self, sums: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
        return self.gram_shapes if sums is self.gram_sums else self.fisher_shapes

    def _sums_of(self, sums: dict[str, Tensor], name: str, device: torch.device) -> Tensor:
        shape = self._shapes(sums)[name]
        if name not in sums:
            rows = len(range(shape[0])[own_rows(shape[0])]) if self._in_shards else shape[0]
            sums[name] = torch.zeros(rows, *shape[1:], dtype=torch.float64, device=device)
        return sums[name]

    def _add_shards(self, own_sums: Tensor, rows_NF: Tensor, shape: tuple[int, ...]) -> None:
        """Add this process's rows of the products or of the sketch, from the rows of all processes."""
        rows_NF = rows_NF if self._counted else rows_NF[:0]
        own, all_NF = own_rows(shape[0]), gather_rows(rows_NF).double()
        if is_sketch(shape):
            add_sketch(own_sums, all_NF, own)
        else:
            own_sums.addmm_(all_NF[:, own].t(), all_NF)

    def _add_products(self, sums: dict[str, Tensor], name: str, rows: Tensor | Sequence[Tensor]) -> None:
        """Add `rows^T rows` of rows `[N, F]`, or those of each block, or sketches of them; of indices `[N, 1]` to a
        diagonal their counts."""
        shape = self._shapes(sums)[name]
        own_sums = self._sums_of(sums, name, rows.device if isinstance(rows, Tensor) else rows[0].device)
        if self._in_shards:
            assert isinstance(rows, Tensor)
            self._add_shards(own_sums, rows, shape)
        elif not self._counted:
            return
        elif len(shape) == 1:
            assert isinstance(rows, Tensor)
            own_sums += torch.bincount(rows.flatten(), minlength=len(own_sums))
        else:
            blocks: Any = rows if len(shape) == 3 else [rows]
            for total, block_NF in zip(own_sums if len(shape) == 3 else [own_sums], blocks, strict=True):
                if is_sketch(shape):
                    add_sketch(total, block_NF.double())
                else:
                    add_products(total, block_NF.double())

    def _backward(self, logits: Tensor, inputs: Mapping[str, Tensor], hashes: list[int]) -> None:
        """Backward pass of the summed negative log-likelihood of labels drawn from the model's prediction."""
        mask = label_positions(self.model, fisher_labels(logits, inputs, self._mask_BT))
        if logits.ndim == 3 and shifts_labels(self.model):
            logits = logits[:, :-1]
        logits_LV = logits[mask].float()
        uniforms_L = torch.cat(
            [row_uniforms(seed, n) for seed, n in zip(hashes, mask.reshape(len(mask), -1).sum(1).tolist(), strict=True)]
        )
        sampled_L = sample_labels(logits_LV.detach(), uniforms_L.to(logits.device))
        self.labels += len(sampled_L) if self._counted and not self._complete_groups else 0
        F.cross_entropy(logits_LV, sampled_L, reduction="sum").backward()


def _matrices(sums: Tensor) -> Sequence[Tensor]:
    """The exact matrices of sums: one, one for each block, or none of a diagonal or a sketch."""
    if is_sketch(sums.shape):
        return []
    return list(sums) if sums.ndim == 3 else [sums] * (sums.ndim == 2)
