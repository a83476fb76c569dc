"""Accumulating the sums behind `collect_statistics`: one pass over the data for each group of layers.

Shapes: B rows, T positions, N unmasked positions, I and O features of a layer.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_unlearn.core.processes import gather, sum_over_processes, world
from hf_unlearn.core.storage import Storage
from hf_unlearn.data.row_identity import batch_hashes, rows_to_text
from hf_unlearn.errors import ModelError, SettingsError
from hf_unlearn.models.arguments import taken_inputs
from hf_unlearn.models.fingerprint import weights_fingerprint
from hf_unlearn.models.forward import output_logits
from hf_unlearn.models.layers import layer_at
from hf_unlearn.models.modes import eval_mode
from hf_unlearn.statistics.fisher import backward_from_sampled_labels, check_fisher_sizes
from hf_unlearn.statistics.hooks import SharedInputs, record_inputs, without_weight_gradients
from hf_unlearn.statistics.masks import PositionMasks, expanded_indices, unmasked_block_rows, unmasked_rows
from hf_unlearn.statistics.retain_statistics import LayerSums, RetainStatistics
from hf_unlearn.statistics.sketch import EXACT, Sketching
from hf_unlearn.statistics.sums import MomentSums


class Accumulator:
    """The mutable sums behind one `collect_statistics` call.

    Use: `groups` once, then for each group `recording(group)` around `add` of every batch, then `finish`.

    Args:
        model: The model to run.
        layers: The layers to sum over, by name.
        fisher: Also accumulate Fishers, by a backward pass for each batch.
        storage: Where finished sums go.
        sketching: Which sums are sketches.

    Attributes:
        sizes: Geometry of each layer.
        grams, fishers: The sums, by Gram and by layer.
        shared_inputs: Which layers share a Gram.
        positions: Number of rows `X_NI` behind each Gram.
        rows, labels: Number of data rows and of sampled labels, of this process.

    Raises:
        ModelError: A Fisher too large to be exact, or sums in shards of a layer that is not a plain matrix.
    """

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
        in_shards = storage.place == "shards" and world()[1] > 1
        self.grams = MomentSums({n: sketching.shape(layer.gram_shape) for n, layer in self.sizes.items()}, in_shards)
        self.fishers = MomentSums(
            {n: sketching.shape(layer.fisher_shape) for n, layer in self.sizes.items()}, in_shards
        )
        if fisher:
            check_fisher_sizes(self.fishers.shapes)
        if in_shards and (not_plain := [name for name, layer in self.sizes.items() if not layer.plain]):
            raise ModelError(
                f"{not_plain[0]} is not a plain linear layer, and its sums cannot be in shards; keep them on the "
                "device, the cpu or the disk, or leave it out of `layers`"
            )
        self.shared_inputs = SharedInputs()
        self.positions: dict[str, int] = {}
        self.rows = self.labels = 0
        self._row_hashes = 0
        self._masks = PositionMasks(model)
        self._input_masks: dict[str, Tensor | None] = {}  # of the last input of each layer; its output has the same
        self._batch_size = 0
        self._counted = True  # whether the current batch belongs to the data
        self._completed_groups = 0  # rows and labels are counted in the first pass only

    @contextmanager
    def recording(self, names: Sequence[str]) -> Iterator[None]:
        """Accumulate the sums of the layers `names` within a `with` block around one pass over the data.

        The model is in eval mode, with hooks and without gradients of its parameters. At the end the sums are complete
        over all processes and moved to where statistics are kept.
        """
        with self._running(names, self._add_inputs, self._watch_output if self.fisher else None):
            yield
        self.complete(names)

    @contextmanager
    def _running(
        self,
        names: Sequence[str],
        receive: Callable[..., object],
        outputs: Callable[[str, Tensor], Tensor] | None = None,
    ) -> Iterator[None]:
        hooked = {name: self.layers[name] for name in names}
        with without_weight_gradients(self.model), eval_mode(self.model), torch.set_grad_enabled(outputs is not None):
            with record_inputs(hooked, receive, outputs), self._masks.following_encoder():
                yield

    def groups(self, first_batch: Callable[[], Mapping[str, Tensor]], max_memory: int | None) -> list[list[str]]:
        """Split the layers into groups whose unfinished sums take at most `max_memory` bytes on this process, in order.

        Args:
            first_batch: Returns a batch; one forward pass finds the layers that share their input.
            max_memory: Bytes; None: one group.

        Raises:
            SettingsError: Layers that share one input take more.
        """
        if max_memory is None:
            return [list(self.layers)]
        with self._running(list(self.layers), self._note_shared_input):
            self._forward(first_batch())
        gram_of = self.shared_inputs.gram_of
        sizes: dict[str, int] = {}
        for name in self.layers:
            gram = gram_of.get(name, name)
            sizes[gram] = sizes.get(gram, self.grams.bytes_of(gram))
            sizes[gram] += self.fishers.bytes_of(name) if self.fisher else 0
        groups: list[list[str]] = []
        free = 0
        for gram, size in sizes.items():
            if size > max_memory:
                raise SettingsError(f"the sums of {gram} take {size} bytes, above max_memory {max_memory}; raise it")
            if not groups or size > free:
                groups.append([])
                free = max_memory
            groups[-1] += [name for name in self.layers if gram_of.get(name, name) == gram]
            free -= size
        return groups

    def add(self, inputs: Mapping[str, Tensor], counted: bool = True) -> int:
        """Run one batch through the model and return its number of rows.

        Args:
            inputs: The batch.
            counted: If false, the batch only keeps the processes of a distributed run in step and is not added.
        """
        self._counted = counted
        inputs = taken_inputs(self.model, inputs)  # a row is what the model reads of it
        logits, hashes = self._forward(inputs)
        labels = 0
        if self.fisher:
            labels = backward_from_sampled_labels(self.model, logits, inputs, self._masks.current_BT, hashes)
        if counted and not self._completed_groups:
            self.rows += len(hashes)
            self.labels += labels
            self._row_hashes += sum(hashes)
        return len(hashes)

    def _forward(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[int]]:
        """The logits of a batch and a hash of each row."""
        self._masks.start_batch(inputs)
        self.shared_inputs.start_batch()
        self._batch_size = len(next(iter(inputs.values())))
        hashes = batch_hashes(inputs, self._masks.encoder_decoder)
        return output_logits(self.model, inputs), hashes

    def grams_so_far(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the sums of each Gram that is a matrix, over the rows of all processes up to now."""
        return self.grams.so_far()

    def complete(self, names: Sequence[str]) -> None:
        """Sum over the processes what the pass over the layers `names` has accumulated, and move it to its storage."""
        self._completed_groups += 1
        self.grams.complete(names, self.storage)
        self.fishers.complete(names, self.storage)
        counts = {name: torch.tensor(self.positions[name]) for name in names if name in self.positions}
        sum_over_processes(counts)
        self.positions |= {name: int(count) for name, count in counts.items()}

    def finish(self, settings: Mapping[str, Any]) -> RetainStatistics:
        """Return the statistics; `settings` are saved with them.

        Raises:
            ModelError: A layer did not run in any batch.
        """
        gram_of = self.shared_inputs.gram_of
        missing = [name for name in self.layers if name not in gram_of]
        if missing:
            raise ModelError(f"{missing[0]} (and {len(missing) - 1} more layers) never ran; leave them out of `layers`")
        totals = {"rows": torch.tensor(self.rows), "labels": torch.tensor(self.labels)}
        sum_over_processes(totals)
        return RetainStatistics(
            gram_sums=self.grams.tensors,
            fisher_sums={name: self.fishers.tensors[name] for name in self.layers} if self.fisher else {},
            layers={n: LayerSums(gram_of[n], size.outputs, size.transposed) for n, size in self.sizes.items()},
            positions=self.positions,
            rows=int(totals["rows"]),
            labels=int(totals["labels"]),
            weights=weights_fingerprint(self.model),
            data=rows_to_text(sum(gather(self._row_hashes))),
            settings=settings,
            storage=self.storage,
        )

    def _note_shared_input(self, name: str, tensor: Tensor, *arguments: Any) -> bool:
        """Whether an earlier layer has added the rows of this input already."""
        if self.sizes[name].rows is not None:  # the layer makes its own rows of the tensor
            self.shared_inputs.add_unshared(name)
            return False
        return self.shared_inputs.is_shared(name, tensor)

    def _add_inputs(self, name: str, tensor: Tensor, *arguments: Any) -> None:
        layer = self.sizes[name]
        mask = self._input_masks[name] = self._masks.of_input(tensor)
        if self._note_shared_input(name, tensor):
            return
        with torch.no_grad():
            rows: Any = tensor.detach() if layer.rows is None else layer.rows(tensor.detach(), *arguments)
        if isinstance(rows, Tensor):
            rows = expanded_indices(rows, self._batch_size) if layer.diagonal else rows
            rows = self.unmasked(rows, mask, layer.blocks)
        else:
            rows = unmasked_block_rows(rows, mask)
        count = sum(map(len, rows)) if layer.blocks > 1 else len(rows)
        self.positions.setdefault(name, 0)
        self.positions[name] += count if self._counted else 0
        self.grams.add(name, rows, self._counted)

    def _watch_output(self, name: str, output: Tensor) -> Tensor:
        if not output.requires_grad:  # the first layer: everything before it is frozen
            output = output.detach().requires_grad_().clone()  # not a leaf: an activation may work in place
        self.fishers.tensor(name, output.device)  # stays zero if no gradient comes
        mask = self._input_masks[name]
        output.register_hook(lambda gradient: self._add_gradient(name, gradient, mask))
        return output

    def _add_gradient(self, name: str, gradient: Tensor | None, mask: Tensor | None) -> None:
        if gradient is None:
            raise ModelError(
                f"no gradient flows back to {name} (4-bit weights on the CPU have none after a pass without gradients "
                "has packed them); collect right after loading, or without fisher"
            )
        layer = self.sizes[name]
        rows = gradient if layer.output_rows is None else layer.output_rows(gradient)
        self.fishers.add(name, self.unmasked(rows, mask, layer.blocks), self._counted)

    @staticmethod
    def unmasked(tensor: Tensor, mask: Tensor | None, blocks: int = 1) -> Tensor:
        """`masks.unmasked_rows`; a subclass may trace it."""
        return unmasked_rows(tensor, mask, blocks)
