"""Collecting: forward passes over a data set, with hooks that sum the second moments of layer inputs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor, nn
from torch.utils.data import Subset
from tqdm.auto import tqdm

from hf_unlearn.core.processes import gather, is_main, own_indices
from hf_unlearn.data.batches import default_collator, own_batches, take
from hf_unlearn.data.encoded_checks import check_encoded
from hf_unlearn.data.encoding import encode_dataset
from hf_unlearn.errors import ModelError, SettingsError
from hf_unlearn.models.layers import find_layers
from hf_unlearn.models.readiness import check_base_model, check_loaded
from hf_unlearn.models.tasks import ProcessingClass
from hf_unlearn.statistics.accumulator import Accumulator
from hf_unlearn.statistics.early_stop import in_random_order
from hf_unlearn.statistics.options import CollectionOptions
from hf_unlearn.statistics.retain_statistics import SAMPLED_FROM, RetainStatistics
from hf_unlearn.statistics.sketch import SKETCH_ABOVE, SKETCH_RANK

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    Rows: TypeAlias = Sequence[Mapping[str, Any]] | Dataset | IterableDataset

Collator = Callable[[Sequence[Mapping[str, Any]]], Mapping[str, Tensor]]


def collect_statistics(
    model: nn.Module,
    dataset: "Rows",
    *,
    collator: Collator | None = None,
    processing_class: "ProcessingClass | None" = None,
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
    """Sum `X^T X`, and with `fisher=True` also `Y^T Y`, of every layer over `dataset`.

    Positions whose attention mask is 0 do not count; labels of -100 do not mask inputs. Layers that read the same
    tensor (q, k, v; gate, up) share one Gram. Products and sums are float64. The labels of the Fisher are sampled from
    the model's own prediction at the label positions (all unmasked positions if the rows have no labels). Their
    generator is seeded by the content of the row: the same row gets the same labels in any batch, so that subtraction
    is exact (METHOD, section 1).

    In a distributed run every process takes its own share of the rows. No row counts twice, and all processes get the
    same sums.

    The model runs in eval mode; its mode, `requires_grad` flags and hooks are restored, also after an error.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_unlearn.statistics import collect_statistics
    >>> config = LlamaConfig(
    ...     vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    ... )
    >>> model = LlamaForCausalLM(config)
    >>> rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4, 5], "labels": [4, 5]}]
    >>> full = collect_statistics(model, rows, progress=False)
    >>> full.rows, len(full.layers), len(full.gram_sums)
    (2, 7, 4)
    >>> full.gram("model.layers.0.mlp.down_proj").shape
    torch.Size([32, 32])
    >>> forget = collect_statistics(model, rows[:1], progress=False)
    >>> (full - forget).rows
    1

    Args:
        model: Any model with layers of known types; see `register_layer`.
        dataset: Rows in a format of `encode_dataset`, also streamed (`datasets.IterableDataset`).
        collator: Rows to batch; default: padding on the right.
        processing_class: Tokenizer or image processor, needed for raw rows.
        batch_size, fisher, layers, max_rows, keep_on, max_memory, sketch_above, sketch_rank, tolerance, progress: As in
            `CollectionOptions`.

    Raises:
        DataError: Empty data set or unknown row format.
        ModelError: No layer that can be handled, a Fisher larger than 16384 x 16384, weights that are not in memory
            (offloaded), or an active adapter that has been trained.
        SettingsError: As `CollectionOptions`; a `max_memory` that is too small for a layer, or a tolerance with several
            passes.
    """
    options = CollectionOptions(
        batch_size=batch_size,
        fisher=fisher,
        layers=layers,
        max_rows=max_rows,
        keep_on=keep_on,
        max_memory=max_memory,
        sketch_above=sketch_above,
        sketch_rank=sketch_rank,
        tolerance=tolerance,
        progress=progress,
    )
    return collect_with_options(model, dataset, options, collator=collator, processing_class=processing_class)


def collect_with_options(
    model: nn.Module,
    dataset: "Rows",
    options: CollectionOptions,
    *,
    collator: Collator | None = None,
    processing_class: "ProcessingClass | None" = None,
) -> RetainStatistics:
    """`collect_statistics` with its options in one object."""
    check_loaded(model)
    check_base_model(model)
    encoded = encode_dataset(dataset, processing_class, what="statistics", model=model, streams=True)
    rows = take(encoded, options.max_rows)
    check_encoded(rows, "statistics", model)
    if any(hasattr(p, "ds_id") and not hasattr(p, "_z3_optimizer") for p in model.parameters()):
        raise ModelError(
            "DeepSpeed partitioned the weights at loading; load the model before creating UnlearningConfig"
        )
    early_stop = options.early_stop()
    if early_stop is not None and hasattr(rows, "__len__"):
        rows = Subset(rows, in_random_order(len(rows)))
    layers = find_layers(model, options.layers, options.fisher)
    accumulator = Accumulator(model, layers, options.fisher, options.storage, options.sketching)
    collate = collator or default_collator(processing_class)
    device = next(model.parameters()).device

    def batches() -> Iterator[tuple[dict[str, Tensor], bool]]:
        for batch, counted in own_batches(rows, collate, options.batch_size):
            yield {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}, counted

    hide_progress = not (options.progress and is_main())
    total = len(own_indices(len(rows))) if hasattr(rows, "__len__") else None
    groups = accumulator.groups(lambda: next(batches())[0], options.max_memory_bytes)
    if early_stop is not None and len(groups) > 1:
        raise SettingsError("a tolerance needs all layers in one pass; leave out max_memory")
    for number, group in enumerate(groups, 1):
        title = "Collecting" if len(groups) == 1 else f"Collecting ({number}/{len(groups)})"
        with accumulator.recording(group), tqdm(total=total, desc=title, unit="row", disable=hide_progress) as bar:
            for inputs, counted in batches():
                bar.update(accumulator.add(inputs, counted))
                if early_stop is not None and early_stop.should_stop(accumulator.grams_so_far):
                    break
    settings = options.settings()
    if early_stop is not None:
        settings |= {"tolerance": options.tolerance, "change": early_stop.change}
        available = len(rows) if hasattr(rows, "__len__") else "a stream's"
        used = sum(gather(accumulator.rows))
        settings |= {SAMPLED_FROM: available} if early_stop.stopped and used != available else {}
    return accumulator.finish(settings)
