"""`RetainStatistics`: second moments of layer inputs and output gradients, which add, subtract, save and load.

Shapes: N positions (unmasked rows of the layer inputs), I input features, O output features of one layer, G blocks.
"""

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_unlearn.core.processes import is_main, wait_for_all, world
from hf_unlearn.core.provenance import package_versions
from hf_unlearn.core.sharding import is_dtensor
from hf_unlearn.core.storage import Storage, fetch, shard
from hf_unlearn.data.row_identity import combine_rows
from hf_unlearn.errors import StatisticsError
from hf_unlearn.models.fingerprint import weights_fingerprint
from hf_unlearn.models.layers import known_layers, layer_at
from hf_unlearn.models.readiness import check_base_model
from hf_unlearn.statistics.decompositions import Decompositions, Job, Key
from hf_unlearn.statistics.eigen import Eigen
from hf_unlearn.statistics.serialisation import METADATA, local_folder, read_statistics, write_statistics
from hf_unlearn.statistics.sketch import SKETCH_RANK, exact_shape, is_sketch
from hf_unlearn.statistics.summary import summary_table

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

SAMPLED_FROM = "sampled_from"
"""Setting of statistics that stopped before the last row: the number of rows that theirs are a random sample of."""


@dataclass(frozen=True)
class LayerSums:
    """What the statistics know of one layer.

    Attributes:
        inputs: Name of its Gram, which it shares with the layers that read the same tensor.
        outputs: O.
        transposed: Whether the layer stores its weight as `[I, O]`.
    """

    inputs: str
    outputs: int
    transposed: bool


@dataclass(frozen=True, eq=False, repr=False)
class RetainStatistics:
    """Sums over data of `X^T X` (Gram) and `Y^T Y` (Fisher) of each layer; immutable, on any device.

    `a + b` is what one pass over both data sets would have collected, `a - b` what a pass over `a`'s rows without
    `b`'s would have (PGU, WACV 2024, section 3.3: no retained row is read). Both need statistics of the same weights.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from hf_unlearn.statistics import collect_statistics
    >>> config = LlamaConfig(
    ...     vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    ... )
    >>> model = LlamaForCausalLM(config)
    >>> rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4, 5], "labels": [4, 5]}]
    >>> full = collect_statistics(model, rows, progress=False)
    >>> forget = collect_statistics(model, rows[:1], progress=False)
    >>> retain = full - forget
    >>> retain.rows, retain.positions["model.layers.0.mlp.down_proj"]
    (1, 2)
    >>> retain.data == collect_statistics(model, rows[1:], progress=False).data
    True

    Attributes:
        gram_sums: Float64 `[I, I]` by the name of the first layer that reads the input; `[G, I, I]` of a layer of G
            blocks, `[I]` where it is diagonal (`models.layers.Layer`). Of a Gram too wide to be kept exactly its
            sketch, `[I, R + 1]` or `[G, I, R + 1]`, which adds and subtracts like the Gram (`Sketching`).
        fisher_sums: Float64 `[O, O]` or `[G, O, O]` by layer, or sketches; empty without a Fisher pass.
        layers: The protected layers.
        positions: N by Gram, of all blocks together.
        rows: Number of data rows behind the sums.
        labels: Number of labels that the Fisher pass sampled (0 without one).
        weights: `weights_fingerprint` of the model.
        data: Hash of the rows that does not depend on their order.
        settings: The options of the collecting call.
        versions: Versions of the packages that made the sums.
        storage: Where the sums and their decompositions are kept. In `shards`, every process must make each call.
    """

    gram_sums: Mapping[str, Tensor]
    fisher_sums: Mapping[str, Tensor]
    layers: Mapping[str, LayerSums]
    positions: Mapping[str, int]
    rows: int
    labels: int
    weights: str
    data: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=package_versions)
    storage: Storage = Storage()
    _decompositions: Decompositions = field(default_factory=Decompositions, init=False)

    def __repr__(self) -> str:
        return (
            f"RetainStatistics(rows={self.rows}, layers={len(self.layers)}, grams={len(self.gram_sums)}, "
            f"fishers={len(self.fisher_sums)}, weights={self.weights[:12]!r}, data={self.data[:12]!r})"
        )

    def summary(self) -> str:
        """Return a table of the Grams: sizes, ranks, and the shares of missed and of negative energy.

        See `summary_table` for its columns.
        """
        return summary_table(self)

    def gram(self, layer: str) -> Tensor:
        """Return `gram_II = X^T X / N`: uncentred second moment of the inputs of `layer`, float64, or its sketch."""
        key = self.layers[layer].inputs
        return self.gram_sums[key] / max(self.positions[key], 1)

    def fisher(self, layer: str) -> Tensor:
        """Return `fisher_OO = Y^T Y / N`: the second moment of the output gradients of `layer`, float64; or its sketch.

        Raises:
            StatisticsError: The statistics have no Fisher of this layer.
        """
        self._require_fisher(layer)
        return self.fisher_sums[layer] / max(self.positions[self.layers[layer].inputs], 1)

    def _require_fisher(self, layer: str) -> None:
        if layer not in self.fisher_sums:
            raise StatisticsError(f"{layer} has no Fisher; collect the statistics with fisher=True")

    def positions_per_label(self, layer: str) -> float:
        """Return N over the number of sampled labels: it turns `tr(fisher D gram D^T) / 2` into nats per label."""
        return self.positions[self.layers[layer].inputs] / max(self.labels, 1)

    @property
    def sampled_from(self) -> int | str | None:
        """How many rows these are a random sample of, if collecting stopped early; None if it read them all."""
        return self.settings.get(SAMPLED_FROM)

    @property
    def matching_arguments(self) -> dict[str, Any]:
        """The arguments of `collect_statistics` for statistics that add to and subtract from these."""
        settings = {"sketch_above": None, "sketch_rank": SKETCH_RANK} | dict(self.settings)
        return {name: settings[name] for name in ("fisher", "layers", "sketch_above", "sketch_rank")}

    # Decompositions

    def gram_eigen(self, layer: str) -> Eigen:
        """Return the eigendecomposition of `gram(layer)`, with vectors in float32; computed once for each Gram."""
        return self._decompositions.get(("gram", self.layers[layer].inputs), self._gram_job(layer), self.storage)

    def fisher_eigen(self, layer: str) -> Eigen:
        """Return the eigendecomposition of `fisher(layer)`, with vectors in float32; computed once.

        Raises:
            StatisticsError: The statistics have no Fisher of this layer.
        """
        return self._decompositions.get(("fisher", layer), self._fisher_job(layer), self.storage)

    def decompose(self, layers: Iterable[str], fisher: bool = False, device: torch.device | str | None = None) -> None:
        """Compute the decompositions that `layers` need, divided among the processes of a distributed run.

        Args:
            layers: Names of layers.
            fisher: Also decompose their Fishers.
            device: Where to compute; default: where the sums are.
        """
        jobs: dict[Key, Job] = {}
        for layer in layers:
            jobs["gram", self.layers[layer].inputs] = self._gram_job(layer)
            if fisher:
                jobs["fisher", layer] = self._fisher_job(layer)
        self._decompositions.compute(jobs, self.storage, device)

    def _gram_job(self, layer: str) -> Job:
        key = self.layers[layer].inputs
        return Job(lambda: self.gram(layer), self.gram_sums[key].shape, self.positions[key])

    def _fisher_job(self, layer: str) -> Job:
        self._require_fisher(layer)
        positions = self.positions[self.layers[layer].inputs]
        return Job(lambda: self.fisher(layer), self.fisher_sums[layer].shape, positions)

    # Sums and differences

    def __add__(self, other: "RetainStatistics") -> "RetainStatistics":
        return self._combine(other, 1)

    def __sub__(self, other: "RetainStatistics") -> "RetainStatistics":
        if other.rows > self.rows:
            raise StatisticsError(f"cannot subtract statistics of {other.rows} rows from those of {self.rows} rows")
        for operand in (self, other):
            if operand.sampled_from is not None:
                raise StatisticsError(
                    f"statistics of a sample ({operand.rows} of {operand.sampled_from} rows, stopped by a tolerance) "
                    "cannot be subtracted, because their rows were chosen at random; collect them on the retain rows, "
                    "or without tolerance"
                )
        return self._combine(other, -1)

    def _combine(self, other: "RetainStatistics", sign: int) -> "RetainStatistics":
        if not isinstance(other, RetainStatistics):
            return NotImplemented
        self._check_combinable(other)
        return replace(
            self,
            gram_sums={k: self._add(v, other.gram_sums[k], sign) for k, v in self.gram_sums.items()},
            fisher_sums={k: self._add(v, other.fisher_sums[k], sign) for k, v in self.fisher_sums.items()},
            positions={k: n + sign * other.positions[k] for k, n in self.positions.items()},
            rows=self.rows + sign * other.rows,
            labels=self.labels + sign * other.labels,
            data=combine_rows(self.data, other.data, sign),
        )

    def _check_combinable(self, other: "RetainStatistics") -> None:
        """Raise `StatisticsError` unless both are statistics of the same layers and weights, of the same kind."""
        if self.layers != other.layers:
            raise StatisticsError(f"statistics of different layers cannot be combined: {_difference(self, other)}")
        if self.weights != other.weights:
            raise StatisticsError(
                f"statistics of different weights ({self.weights[:12]} and {other.weights[:12]}) cannot be combined; "
                "collect both on the same model"
            )
        if bool(self.fisher_sums) != bool(other.fisher_sums):
            raise StatisticsError("only one of the two statistics has a Fisher; collect both with fisher=True")
        for moment, sums in (("gram", self.gram_sums), ("fisher", self.fisher_sums)):
            for key, ours in sums.items():
                theirs = (other.gram_sums if moment == "gram" else other.fisher_sums)[key]
                if ours.shape != theirs.shape:
                    raise StatisticsError(
                        f"the {moment} of {key} is {_exactness(ours.shape)} here and {_exactness(theirs.shape)} there, "
                        "which cannot be combined; collect both with the same sketch_above and sketch_rank"
                    )

    def _add(self, sums: Tensor, other: Tensor, sign: int) -> Tensor:
        if is_dtensor(sums):
            return sums + sign * shard(other)
        return self.storage.keep(sums + sign * fetch(other, sums.device))

    def kept_on(self, place: str) -> "RetainStatistics":
        """Return the same statistics kept elsewhere (see `Storage`), without their decompositions."""
        storage = Storage(place)
        if storage == self.storage:
            return self
        return replace(
            self,
            gram_sums={key: storage.keep(sums) for key, sums in self.gram_sums.items()},
            fisher_sums={name: storage.keep(sums) for name, sums in self.fisher_sums.items()},
            storage=storage,
        )

    def check_model(self, model: nn.Module, *, allow_other_weights: bool = False) -> None:
        """Raise `StatisticsError` unless these are statistics of `model`: same layers and, by default, same weights.

        An active adapter that has been trained raises `ModelError`.
        """
        check_base_model(model)
        modules = known_layers(model)
        for name, sums in self.layers.items():
            layer = layer_at(name, modules[name]) if name in modules else None
            shape = exact_shape(tuple(self.gram_sums[sums.inputs].shape))
            if layer is None or (layer.outputs, layer.gram_shape) != (sums.outputs, shape):
                seen = f"is {_size_text(layer.outputs, layer.gram_shape)}" if layer else "does not exist"
                raise StatisticsError(
                    f"these statistics belong to another model: they have {name} as {_size_text(sums.outputs, shape)}, "
                    f"which {seen} in {type(model).__name__}; collect statistics of this model"
                )
        if not allow_other_weights and (fingerprint := weights_fingerprint(model)) != self.weights:
            raise StatisticsError(
                f"these statistics belong to other weights ({self.weights[:12]}, the model has {fingerprint[:12]}); "
                "collect them again on this model; in Python, allow_other_weights=True loads them all the same"
            )

    # Files

    def save_pretrained(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write `statistics.safetensors` and `statistics.json` to `folder`, atomically, and return its path.

        In a distributed run process 0 writes. If the sums are in shards, every process must call this, and it returns
        once they are written.

        Raises:
            OutputError: `folder` is not empty and `overwrite` is false.
        """
        if self.storage.place == "shards" and world()[1] > 1:
            path = self.kept_on("disk").save_pretrained(folder, overwrite=overwrite)
            wait_for_all()
            return path
        if is_main():
            tensors = {f"gram.{k}": v for k, v in self.gram_sums.items()}
            tensors |= {f"fisher.{k}": v for k, v in self.fisher_sums.items()}
            write_statistics(folder, tensors, self._metadata(), overwrite)
        return Path(folder)

    def _metadata(self) -> dict[str, Any]:
        saved = ("positions", "rows", "labels", "weights", "data", "settings", "versions")
        layers = {name: asdict(sums) for name, sums in self.layers.items()}
        order = list(layers)  # JSON objects are written sorted: "layers.10" would come before "layers.2"
        return {"layers": layers, "order": order, **{name: getattr(self, name) for name in saved}}

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        model: nn.Module | None = None,
        allow_other_weights: bool = False,
        device: str | torch.device = "cpu",
        keep_on: str = "device",
    ) -> "RetainStatistics":
        """Load statistics from a local folder or a Hub repository.

        On the CPU they are mapped from the file, and read when they are used.

        Args:
            folder: Local folder, or `user/repo` on the Hub.
            revision: Branch, tag or commit on the Hub.
            token: Read token for a private repository; default: `HF_TOKEN` or that of `hf auth login`.
            model: If given, `check_model` is applied.
            allow_other_weights: Accept statistics of other weights of the same architecture.
            device: Where the sums go.
            keep_on: Where what is computed from them is kept; see `Storage`.

        Raises:
            StatisticsError: Missing, truncated or altered files, a newer format, or another model.
        """
        path = local_folder(folder, revision, token)
        tensors, metadata = read_statistics(path, device)
        try:
            loaded = cls._from_metadata(metadata, tensors)
        except (KeyError, TypeError, AttributeError) as error:
            raise StatisticsError(f"{path / METADATA} cannot be read ({error!r}); collect again") from error
        if model is not None:
            loaded.check_model(model, allow_other_weights=allow_other_weights)
        return loaded.kept_on(keep_on) if keep_on == "shards" else replace(loaded, storage=Storage(keep_on))

    @classmethod
    def _from_metadata(cls, metadata: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "RetainStatistics":
        saved = metadata["layers"]
        rank = {name: index for index, name in enumerate(metadata.get("order", saved))}
        layers = {name: LayerSums(**saved[name]) for name in sorted(saved, key=lambda name: rank[name])}
        return cls(
            gram_sums={key: tensors[f"gram.{key}"] for key in dict.fromkeys(sums.inputs for sums in layers.values())},
            fisher_sums={name: tensors[f"fisher.{name}"] for name in layers if f"fisher.{name}" in tensors},
            layers=layers,
            **{name: value for name, value in metadata.items() if name not in ("order", "layers")},
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Retain statistics",
        update: bool = False,
    ) -> "CommitInfo | None":
        """Publish these statistics with a short card; `from_pretrained(repo_id)` loads them again.

        They are first saved to a temporary folder, which is kept if the push fails. In a distributed run process 0
        pushes and returns the commit; the others return None. If the sums are in shards, every process must call this.

        Args:
            repo_id, private, token, revision, commit_message, update: As in `core.hub.push_folder`.

        Raises:
            PushError, SettingsError: As `core.hub.push_folder`.
        """
        from hf_unlearn.core.push_options import PushOptions
        from hf_unlearn.statistics.publishing import save_and_push

        return save_and_push(self, repo_id, PushOptions(private, token, revision, commit_message, update))


def _size_text(outputs: int, gram_shape: tuple[int, ...]) -> str:
    return f"{outputs} x {gram_shape[-1]}" + (f" ({gram_shape[0]} blocks)" if len(gram_shape) == 3 else "")


def _exactness(shape: tuple[int, ...]) -> str:
    return f"a sketch of rank {shape[-1] - 1}" if is_sketch(shape) else "exact"


def _difference(a: RetainStatistics, b: RetainStatistics) -> str:
    names = sorted(set(a.layers) ^ set(b.layers)) or [n for n in a.layers if a.layers[n] != b.layers[n]]
    return f"{len(names)} differ, first {names[0]!r}"
