"""Collecting: forward passes over a data set, with hooks that sum the second moments of layer inputs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from accelerate.utils import convert_file_size_to_int
from torch import Tensor, nn
from torch.utils.data import Subset
from tqdm.auto import tqdm

from hf_unlearn.core.processes import gather, is_main, own_indices
from hf_unlearn.core.storage import Storage
from hf_unlearn.data.batches import default_collator, own_batches, take
from hf_unlearn.data.encoding import encode_dataset
from hf_unlearn.errors import ModelError, SettingsError
from hf_unlearn.models.layers import find_layers
from hf_unlearn.statistics.accumulator import Accumulator
from hf_unlearn.statistics.early_stop import EarlyStop, in_random_order
from hf_unlearn.statistics.retain_statistics import SAMPLED_FROM, RetainStatistics
from hf_unlearn.statistics.sketch import SKETCH_ABOVE, SKETCH_RANK, Sketching


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
    keep_on: str = "device",
    max_memory: int | str | None = None,
    sketch_above: int | None = SKETCH_ABOVE,
    sketch_rank: int = SKETCH_RANK,
    tolerance: float | None = None,
    progress: bool = True,
) -> RetainStatistics:
    """Sum `X^T X`, and with `fisher=True` `Y^T Y`, of every layer over `dataset`.

    Positions whose attention mask is 0 do not count; labels of -100 do not mask inputs. Layers that see one tensor
    (q, k, v; gate, up) share one Gram. Products and sums are float64. The Fisher's labels are sampled from the model's
    own prediction at the label positions (all unmasked positions where the rows have no labels), with a generator
    seeded by the row's content: the same row gives the same labels in any batch, so that subtraction is exact.

    In a distributed run every process takes its own share of the rows, none twice, and all get the same sums.

    The model runs in eval mode; its mode, `requires_grad` flags and hooks are restored, also on errors.

    Args:
        model: Any model with layers of known types; see `layers.register_layer`.
        dataset: Rows in a format of `data.encode_dataset`, also streamed (`datasets.IterableDataset`), or anything
            that `collator` takes.
        collator: Rows to batch; default pads on the right.
        processing_class: Tokenizer or image processor, needed for raw rows.
        batch_size: Rows a forward pass; it changes the result by rounding only.
        fisher: Also run a backward pass for the Fisher (`KroneckerConstraint`, predicted KL).
        layers: Shell patterns of module names; default and names: `layers.find_layers`.
        max_rows: Stop after this many rows of `dataset`.
        keep_on: Where finished sums go: `device`, `cpu`, `disk` (memory-mapped) or `shards` (each process sums its own
            rows of every Gram from the inputs of all processes, and none ever has a whole one); see `storage.Storage`.
        max_memory: Make several passes over the data, each for as many layers as have unfinished sums of this size
            ("4GB", or bytes) on a process. The result is that of one pass.
        sketch_above: Keep a sketch instead of the Gram (or Fisher) of more features than this; None: of none. A sketch
            adds and subtracts as exactly as a Gram does; what it misses of the energy is in `summary()`, and every
            constraint counts it (`constraints`). Default: 12288, whose Gram takes 1.2 GB.
        sketch_rank: Rank of the sketches: how many leading directions they can hold.
        tolerance: Take the rows in random order (a stream as it comes), and stop once doubling them has moved less than
            this share of the energy out of any Gram's leading directions (`convergence.EarlyStop`). Rows used and
            last change are in `summary()`; nothing can be subtracted from statistics that stopped before the end.
        progress: Show a progress bar.

    Raises:
        DataError: Empty data set or unknown row format.
        ModelError: No layer that can be handled, or a Fisher larger than 16384 x 16384.
        SettingsError: `batch_size`, `max_rows` or `sketch_rank` below 1; a `max_memory` that is no size or too small
            for a layer; a tolerance outside (0, 1), or with several passes.
    """
    if batch_size < 1 or (max_rows is not None and max_rows < 1):
        raise SettingsError(f"batch_size and max_rows must be at least 1, got {batch_size} and {max_rows}")
    rows = take(encode_dataset(dataset, processing_class, what="statistics", model=model, streams=True), max_rows)
    if any(hasattr(p, "ds_id") and not hasattr(p, "_z3_optimizer") for p in model.parameters()):
        raise ModelError("DeepSpeed has cut the weights up at loading; load the model before UnlearningConfig is made")
    convergence = None if tolerance is None else EarlyStop(tolerance)
    if convergence is not None and hasattr(rows, "__len__"):
        rows = Subset(rows, in_random_order(len(rows)))
    sketching = Sketching(sketch_above, sketch_rank)
    collector = Accumulator(model, find_layers(model, layers, fisher), fisher, Storage(keep_on), sketching)
    collate = collator or default_collator(processing_class)
    device = next(model.parameters()).device

    def batches() -> Iterator[tuple[dict[str, Tensor], bool]]:
        for batch, counted in own_batches(rows, collate, batch_size):
            yield {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}, counted

    quiet = not (progress and is_main())
    total = len(own_indices(len(rows))) if hasattr(rows, "__len__") else None
    groups = collector.groups(lambda: next(batches())[0], _size(max_memory))
    if convergence is not None and len(groups) > 1:
        raise SettingsError("a tolerance needs all layers in one pass; leave out max_memory")
    for number, group in enumerate(groups, 1):
        title = "Collecting" if len(groups) == 1 else f"Collecting ({number}/{len(groups)})"
        with collector.recording(group), tqdm(total=total, desc=title, unit="row", disable=quiet) as bar:
            for inputs, counted in batches():
                bar.update(collector.add(inputs, counted))
                if convergence is not None and convergence.settled(collector):
                    break
    settings: dict[str, Any] = {
        "fisher": fisher, "layers": layers and list(layers), "max_rows": max_rows, "sketch_above": sketch_above,
        "sketch_rank": sketch_rank,
    }  # fmt: skip
    if convergence is not None:
        settings |= {"tolerance": tolerance, "change": convergence.change}
        given, seen = len(rows) if hasattr(rows, "__len__") else "a stream's", sum(gather(collector.rows))
        settings |= {SAMPLED_FROM: given} if convergence.stopped and seen != given else {}
    return collector.finish(settings)


def _size(max_memory: int | str | None) -> int | None:
    if max_memory is None:
        return None
    try:
        return convert_file_size_to_int(max_memory)
    except ValueError as error:
        raise SettingsError(f"max_memory must be a size such as '4GB', got {max_memory!r}") from error
