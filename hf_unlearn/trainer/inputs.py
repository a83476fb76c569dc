"""What `UnlearningTrainer` makes of its arguments: encoded rows, checked statistics, frozen parameters."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from hf_unlearn.constraints.registry import needs_fisher
from hf_unlearn.core.processes import gather
from hf_unlearn.data.encoding import encode_dataset
from hf_unlearn.errors import SettingsError, StatisticsError
from hf_unlearn.losses import UnlearningLoss
from hf_unlearn.models.layers import find_layers
from hf_unlearn.models.trainable import Coverage, freeze_all_but, freeze_unprotected, is_weight_of
from hf_unlearn.statistics.collect import collect_with_options
from hf_unlearn.statistics.options import CollectionOptions
from hf_unlearn.statistics.retain_statistics import RetainStatistics
from hf_unlearn.trainer.config import UnlearningConfig


def encoder(
    model: nn.Module, processing_class: Any, args: UnlearningConfig, loss: UnlearningLoss
) -> Callable[[Any, str], Any]:
    """`(data set, its name) -> encoded rows`, or None for None."""

    def encode(dataset: Any, what: str) -> Any:
        if dataset is None and what != "forget":
            return None
        seed = args.seed if what == "forget" and loss.kind.alternates == "idk" else None
        return encode_dataset(
            dataset, processing_class, what=what, max_length=args.max_length, model=model, idk_seed=seed
        )

    return encode


def encode_splits(eval_dataset: Any, encode: Callable[[Any, str], Any]) -> dict[str, Any]:
    if eval_dataset is None:
        return {}
    if not isinstance(eval_dataset, Mapping):
        raise SettingsError("eval_dataset must name its splits, such as {'retain': rows}")
    return {name: encode(rows, name) for name, rows in eval_dataset.items()}


def usable_statistics(
    model: nn.Module, given: Any, retain: Any, collator: Callable, args: UnlearningConfig
) -> RetainStatistics | None:
    """The statistics given, loaded or collected, checked against the model."""
    if given is None and args.constraint != "none":
        if retain is None:
            raise SettingsError(
                f"constraint {args.constraint!r} needs statistics; pass `statistics`, or retain_dataset to collect "
                "them, or choose constraint none"
            )
        options = CollectionOptions.from_config(args, fisher=needs_fisher(args.constraint))
        return collect_with_options(model, retain, options, collator=collator)
    if isinstance(given, (str, os.PathLike)):
        given = RetainStatistics.from_pretrained(given, keep_on=args.keep_statistics_on)
    if given is not None:
        given.check_model(model)
    seen = gather(given and (given.weights, given.data))
    if len(set(seen)) > 1:
        raise StatisticsError(f"{len(seen)} processes have {len(set(seen))} different statistics; give all the same")
    if given is not None and args.keep_statistics_on != "device":
        given = given.kept_on(args.keep_statistics_on)
    return given


def freeze_for_run(
    model: nn.Module, statistics: RetainStatistics | None, constraint: Any, args: UnlearningConfig
) -> Coverage:
    """Coverage of the run; without a constraint the same weights train, all of them exposed."""
    freeze_all_but(model, args.train_only)
    if constraint is not None and statistics is not None:
        return freeze_unprotected(model, statistics.layers, args.allow_exposed, args.freeze)
    layers = statistics.layers if statistics is not None else find_layers(model)
    exposed = [name for name, _ in model.named_parameters() if is_weight_of(name, layers)]
    return freeze_unprotected(model, (), [*exposed, *args.allow_exposed], args.freeze)
