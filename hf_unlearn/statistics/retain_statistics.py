"""`RetainStatistics`: second moments of layer inputs and output gradients, that add, subtract and travel.

Shapes: N positions (unmasked rows of the layer inputs), I input features, O output features of one layer.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_unlearn.core.files import replace_folder, sha256_of, write_json
from hf_unlearn.core.processes import communication_device, from_owner, is_main, share_out, wait_for_all, world
from hf_unlearn.core.provenance import package_versions
from hf_unlearn.core.sharding import whole
from hf_unlearn.core.storage import Storage, fetch, shard
from hf_unlearn.data.row_identity import combine_rows
from hf_unlearn.errors import StatisticsError
from hf_unlearn.models.fingerprint import weights_fingerprint
from hf_unlearn.models.layers import known_layers, layer_at
from hf_unlearn.statistics.eigen import Eigen, eigendecomposition, rank_for_energy
from hf_unlearn.statistics.sketch import SKETCH_RANK, exact_shape, is_sketch

FORMAT_VERSION = 2  # 1, which knows no sketches, is still written where there are none
SAMPLED_FROM = "sampled_from"
"""Setting of statistics that stopped before the last row: of how many rows theirs are a random sample."""
TENSORS, METADATA = "statistics.safetensors", "statistics.json"


@dataclass(frozen=True)
class LayerSums:
    """What one layer has: `inputs` names the Gram it shares with the layers that see the same tensor."""

    inputs: str
    outputs: int
    transposed: bool


@dataclass(frozen=True, eq=False)
class RetainStatistics:
    """Sums over data of `X^T X` (Gram) and `Y^T Y` (Fisher) of each layer; immutable, on any device.

    `a + b` is what one pass over both data sets would have collected, `a - b` what a pass over `a`'s rows without
    `b`'s would have (PGU section 3.3: no retained row is read). Both need statistics of the same weights.

    Attributes:
        gram_sums: Float64 `[I, I]` by the name of the first layer that sees the input; `[G, I, I]` of a layer of G
            blocks, `[I]` where it is diagonal (`layers.Layer`). Of one too wide to be kept whole its sketch,
            `[I, R + 1]` or `[G, I, R + 1]`, which adds and subtracts like the Gram itself (`sketch.Sketching`).
        fisher_sums: Float64 `[O, O]` or `[G, O, O]` by layer, or sketches; empty where no Fisher pass was made.
        layers: Each protected layer's sizes and the key of its Gram.
        positions: N by Gram key, of all blocks together.
        rows: Number of data rows behind the sums.
        labels: Number of labels that the Fisher pass sampled (0 without one).
        weights: `weights_fingerprint` of the model.
        data: Order-independent hash of the rows; see `fingerprint.rows_fingerprint`.
        settings: The arguments of the collecting call.
        versions: Versions of the packages that made the sums.
        storage: Where the sums and their decompositions are kept; in `shards`, every process must make each call.
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
    _eigen: dict[tuple[str, str], Eigen] = field(default_factory=dict, init=False, repr=False)

    def gram(self, layer: str) -> Tensor:
        """`gram_II = X^T X / N`: uncentred second moment of the inputs of `layer`, float64; or the sketch of it."""
        key = self.layers[layer].inputs
        return self.gram_sums[key] / max(self.positions[key], 1)

    def fisher(self, layer: str) -> Tensor:
        """`fisher_OO = Y^T Y / N`: second moment of the output gradients of `layer`, float64; or the sketch of it."""
        self._require_fisher(layer)
        return self.fisher_sums[layer] / max(self.positions[self.layers[layer].inputs], 1)

    def _require_fisher(self, layer: str) -> None:
        if layer not in self.fisher_sums:
            raise StatisticsError(f"{layer} has no Fisher; collect the statistics with fisher=True")

    def gram_eigen(self, layer: str) -> Eigen:
        """Eigen-decomposition of `gram(layer)`, vectors rounded to float32; made once, shared with the Gram."""
        return self._decomposed("gram", self.layers[layer].inputs, self.gram, layer)

    def fisher_eigen(self, layer: str) -> Eigen:
        """Eigen-decomposition of `fisher(layer)`, vectors rounded to float32; made once."""
        return self._decomposed("fisher", layer, self.fisher, layer)

    def decompose(self, layers: Iterable[str], fisher: bool = False, device: torch.device | str | None = None) -> None:
        """Make the decompositions that `layers` need, split over the processes of a distributed run.

        Args:
            device: Where to compute; default where the sums are.
        """
        jobs: dict[tuple[str, str], str] = {}
        for layer in layers:
            jobs["gram", self.layers[layer].inputs] = layer
            if fisher:
                self._require_fisher(layer)
                jobs["fisher", layer] = layer
        jobs = {job: layer for job, layer in jobs.items() if job not in self._eigen}
        owners = share_out({job: self._sums(*job).shape[-1] for job in jobs})
        own = {}
        for (kind, key), layer in jobs.items():  # one matrix after the other is gathered; its owner keeps it
            matrix = self.gram(layer) if kind == "gram" else self.fisher(layer)
            matrix = fetch(matrix, device or matrix.device)
            if owners[kind, key] == world()[0]:
                own[kind, key] = matrix
        found = {job: eigendecomposition(own.pop(job), self.positions[self.layers[jobs[job]].inputs]).rounded() for job in list(own)}
        for job in jobs:
            parts = found.pop(job, None)
            parts = self._from_owner(job, parts, owners[job])
            self._eigen[job] = replace(parts, vectors_II=self.storage.keep(parts.vectors_II))

    def _from_owner(self, job: tuple[str, str], parts: Eigen | None, owner: int) -> Eigen:
        """The decomposition that process `owner` has made, on every process."""
        if world()[1] == 1:
            assert parts is not None
            return parts
        form = torch.tensor([0, 0] if parts is None else [parts.values_I.shape[-1], parts.missed is not None])
        from_owner([form], owner)
        if parts is None:
            parts = _like_eigen(self._sums(*job).shape, *form.tolist())
        share = torch.tensor(parts.negative_share, dtype=torch.float64)
        missed = [] if parts.missed is None else [parts.missed]
        from_owner([parts.values_I, parts.vectors_II, share, *missed], owner)
        return replace(parts, negative_share=share.item())

    @property
    def same_kind(self) -> dict[str, Any]:
        """The arguments of `collect_statistics` that make statistics which add to and subtract from these."""
        settings = {"sketch_above": None, "sketch_rank": SKETCH_RANK} | dict(self.settings)
        return {name: settings[name] for name in ("fisher", "layers", "sketch_above", "sketch_rank")}

    def _sums(self, kind: str, key: str) -> Tensor:
        return (self.gram_sums if kind == "gram" else self.fisher_sums)[key]

    def _decomposed(self, kind: str, key: str, matrix: Callable[[str], Tensor], layer: str) -> Eigen:
        if (kind, key) not in self._eigen:
            parts = eigendecomposition(whole(matrix(layer)), self.positions[self.layers[layer].inputs]).rounded()
            self._eigen[kind, key] = replace(parts, vectors_II=self.storage.keep(parts.vectors_II))
        return self._eigen[kind, key]

    def positions_per_label(self, layer: str) -> float:
        """N over the number of sampled labels: turns `tr(fisher D gram D^T) / 2` into nats per label."""
        return self.positions[self.layers[layer].inputs] / max(self.labels, 1)

    def __add__(self, other: "RetainStatistics") -> "RetainStatistics":
        return self._combine(other, 1)

    def __sub__(self, other: "RetainStatistics") -> "RetainStatistics":
        if other.rows > self.rows:
            raise StatisticsError(f"cannot subtract statistics of {other.rows} rows from those of {self.rows} rows")
        for one in (self, other):
            if SAMPLED_FROM in one.settings:
                raise StatisticsError(
                    f"statistics of a sample ({one.rows} of {one.settings[SAMPLED_FROM]} rows, stopped by a tolerance) do "
                    "not subtract: which rows they have was left to chance; collect them on the retain rows, or "
                    "without tolerance"
                )
        return self._combine(other, -1)

    def _combine(self, other: "RetainStatistics", sign: int) -> "RetainStatistics":
        if not isinstance(other, RetainStatistics):
            return NotImplemented
        if self.layers != other.layers:
            raise StatisticsError(f"statistics of different layers do not combine: {_difference(self, other)}")
        if self.weights != other.weights:
            raise StatisticsError(
                f"statistics of different weights ({self.weights[:12]} and {other.weights[:12]}) do not combine; "
                "collect both on the same model"
            )
        if bool(self.fisher_sums) != bool(other.fisher_sums):
            raise StatisticsError("only one of the two statistics has a Fisher; collect both with fisher=True")
        for kind in ("gram", "fisher"):
            for key in self.gram_sums if kind == "gram" else self.fisher_sums:
                ours, theirs = self._sums(kind, key).shape, other._sums(kind, key).shape
                if ours != theirs:
                    raise StatisticsError(
                        f"the {kind} of {key} is {_kind(ours)} here and {_kind(theirs)} there, which do not combine; "
                        "collect both with the same sketch_above and sketch_rank"
                    )
        return replace(
            self,
            gram_sums={k: self._add(v, other.gram_sums[k], sign) for k, v in self.gram_sums.items()},
            fisher_sums={k: self._add(v, other.fisher_sums[k], sign) for k, v in self.fisher_sums.items()},
            positions={k: n + sign * other.positions[k] for k, n in self.positions.items()},
            rows=self.rows + sign * other.rows,
            labels=self.labels + sign * other.labels,
            data=combine_rows(self.data, other.data, sign),
        )

    def _add(self, sums: Tensor, other: Tensor, sign: int) -> Tensor:
        if isinstance(sums, DTensor):
            return sums + sign * shard(other)
        return self.storage.keep(sums + sign * fetch(other, sums.device))

    def kept_on(self, place: str) -> "RetainStatistics":
        """The same statistics, kept elsewhere; see `storage.Storage`. Decompositions are made anew."""
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
        """Raise `StatisticsError` unless these are statistics of `model`: same layers and, by default, same weights."""
        modules = known_layers(model)
        for name, sums in self.layers.items():
            layer = layer_at(name, modules[name]) if name in modules else None
            size = exact_shape(tuple(self.gram_sums[sums.inputs].shape))
            if layer is None or (layer.outputs, layer.gram_shape) != (sums.outputs, size):
                seen = f"is {_size(layer.outputs, layer.gram_shape)}" if layer else "does not exist"
                raise StatisticsError(
                    f"these statistics belong to another model: they have {name} as {_size(sums.outputs, size)}, "
                    f"which {seen} in {type(model).__name__}; collect statistics of this model"
                )
        if not allow_other_weights and (seen := weights_fingerprint(model)) != self.weights:
            raise StatisticsError(
                f"these statistics belong to other weights ({self.weights[:12]}, the model has {seen[:12]}); "
                "collect them again, or pass allow_other_weights=True (--allow_other_weights) if that is intended"
            )

    def summary(self) -> str:
        """Table of each Gram: size, positions, ranks at 90% and 99% energy, full rank (of blocks the largest), share of
        the energy that a sketch has missed, and of negative energy.

        A rank with a `>` is above what the sketch holds.
        """
        lines = [
            f"{self.rows} rows, {len(self.layers)} layers, {len(self.gram_sums)} Grams, "
            f"{len(self.fisher_sums)} Fishers, weights {self.weights[:12]}, data {self.data[:12]}",
            f"{'Gram (layers that share it)':<52} {'I':>6} {'N':>9} {'rank90':>7} {'rank99':>7} {'rank':>6} "
            f"{'missed':>8} {'negative':>9}",
        ]
        if "tolerance" in self.settings:
            rest = f" of {self.settings[SAMPLED_FROM]}" if SAMPLED_FROM in self.settings else ", the last"
            lines[0] += f"; stopped at row {self.rows}{rest}, change {self.settings['change']}"
        for key, gram in self.gram_sums.items():
            parts = self.gram_eigen(key)
            blocks = parts.blocks()
            needed = [max(rank_for_energy(b.spectrum_I, e) for b in blocks) for e in (0.9, 0.99, 1.0)]
            held = parts.values_I.shape[-1]
            ranks = [str(rank) if rank <= held else f">{held}" for rank in needed]
            missed = max(block.missed_share for block in blocks)
            sharing = sum(sums.inputs == key for sums in self.layers.values())
            label = key if sharing == 1 else f"{key} (+{sharing - 1})"
            label += f" ({len(gram)} blocks)" if gram.ndim == 3 else ""
            lines.append(
                f"{label:<52} {exact_shape(gram.shape)[-1]:>6} {self.positions[key]:>9} {ranks[0]:>7} {ranks[1]:>7} "
                f"{ranks[2]:>6} {missed:>8.1e} {parts.negative_share:>9.1e}"
            )
        return "\n".join(lines)

    def save_pretrained(self, folder: str | os.PathLike, *, overwrite: bool = False) -> Path:
        """Write `statistics.safetensors` and `statistics.json` to `folder`, atomically.

        In a distributed run process 0 writes; where the sums are in shards, every process must call this, and it
        returns once they are written.

        Raises:
            OutputError: `folder` is not empty and `overwrite` is false.
        """
        if self.storage.place == "shards" and world()[1] > 1:
            saved = self.kept_on("disk").save_pretrained(folder, overwrite=overwrite)
            wait_for_all()
            return saved
        if not is_main():
            return Path(folder)
        with replace_folder(folder, overwrite) as new:
            tensors = {f"gram.{k}": v.contiguous() for k, v in self.gram_sums.items()}
            tensors |= {f"fisher.{k}": v.contiguous() for k, v in self.fisher_sums.items()}
            save_file(tensors, new / TENSORS)
            version = FORMAT_VERSION if any(is_sketch(v.shape) for v in tensors.values()) else 1
            head = {"format_version": version, "sha256": sha256_of(new / TENSORS)}
            write_json(new / METADATA, head | self._metadata())
        return Path(folder)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Retain statistics",
        update: bool = False,
    ) -> Any:
        """Publish these statistics with a short card; `from_pretrained(repo_id)` loads them again.

        They are saved to a temporary folder first, which stays if the push fails. Returns the commit
        (`huggingface_hub.CommitInfo`). In a distributed run process 0 pushes, and the others return None; where the
        sums are in shards, every process must call this.

        Args:
            repo_id, private, token, revision, commit_message, update: As in `hub.push_folder`.

        Raises:
            PushError, SettingsError: As `hub.push_folder`.
        """
        from hf_unlearn.statistics.publishing import push_statistics

        scratch = Path(tempfile.mkdtemp(prefix="statistics-"))
        folder = self.save_pretrained(scratch / repo_id.rpartition("/")[2])
        if not is_main():
            scratch.rmdir()
            return None
        commit = push_statistics(
            folder, repo_id, private=private, token=token, revision=revision, commit_message=commit_message,
            update=update,
        )  # fmt: skip
        shutil.rmtree(scratch)
        return commit

    def _metadata(self) -> dict[str, Any]:
        plain = ("positions", "rows", "labels", "weights", "data", "settings", "versions")
        layers = {name: asdict(sums) for name, sums in self.layers.items()}
        order = list(layers)  # JSON objects are written sorted: "layers.10" would come before "layers.2"
        return {"layers": layers, "order": order, **{name: getattr(self, name) for name in plain}}

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike,
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
            keep_on: Where what is computed from them is kept; see `storage.Storage`.

        Raises:
            StatisticsError: Missing, truncated or altered files, a newer format, or another model.
        """
        path = _local_folder(folder, revision, token)
        content = _read_metadata(path)
        if sha256_of(path / TENSORS) != content["sha256"]:
            raise StatisticsError(f"{path / TENSORS} does not match its checksum (truncated or altered); collect again")
        try:
            tensors = load_file(path / TENSORS, device=str(device))
        except SafetensorError as error:
            raise StatisticsError(f"{path / TENSORS} cannot be read ({error}); collect again") from error
        try:
            loaded = cls._from_content(content, tensors)
        except (KeyError, TypeError, AttributeError) as error:
            raise StatisticsError(f"{path / METADATA} cannot be read ({error!r}); collect again") from error
        if model is not None:
            loaded.check_model(model, allow_other_weights=allow_other_weights)
        return loaded.kept_on(keep_on) if keep_on == "shards" else replace(loaded, storage=Storage(keep_on))

    @classmethod
    def _from_content(cls, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "RetainStatistics":
        place = {name: index for index, name in enumerate(content.get("order", content["layers"]))}
        layers = {n: LayerSums(**content["layers"][n]) for n in sorted(content["layers"], key=lambda n: place[n])}
        return cls(
            gram_sums={key: tensors[f"gram.{key}"] for key in dict.fromkeys(sums.inputs for sums in layers.values())},
            fisher_sums={name: tensors[f"fisher.{name}"] for name in layers if f"fisher.{name}" in tensors},
            layers=layers,
            **{k: v for k, v in content.items() if k not in ("format_version", "sha256", "order", "layers")},
        )


def _size(outputs: int, gram: tuple[int, ...]) -> str:
    return f"{outputs} x {gram[-1]}" + (f" ({gram[0]} blocks)" if len(gram) == 3 else "")


def _kind(shape: tuple[int, ...]) -> str:
    return f"a sketch of rank {shape[-1] - 1}" if is_sketch(shape) else "exact"


def _like_eigen(shape: tuple[int, ...], count: int, thin: int) -> Eigen:
    """Room for the decomposition of sums of this shape into `count` vectors (each block's)."""
    vectors = (*shape[:-1], count)
    values_I = torch.empty((*vectors[:-2], vectors[-1]), dtype=torch.float64, device=communication_device())
    kind = torch.int64 if len(shape) == 1 else torch.float32
    missed = values_I.new_empty(shape[:-2]) if thin else None
    return Eigen(values_I, values_I.new_empty(vectors, dtype=kind), 0.0, missed)


def _difference(a: RetainStatistics, b: RetainStatistics) -> str:
    odd = sorted(set(a.layers) ^ set(b.layers)) or [n for n in a.layers if a.layers[n] != b.layers[n]]
    return f"{len(odd)} differ, first {odd[0]!r}"


def _local_folder(folder: str | os.PathLike, revision: str | None, token: str | bool | None) -> Path:
    path = Path(folder)
    if path.exists():
        return path
    if len(path.parts) != 2 or path.is_absolute():
        raise StatisticsError(f"{folder} is neither a local folder nor a Hub id of the form user/repo")
    from huggingface_hub import snapshot_download

    from hf_unlearn.core.hub import scrub

    try:
        files = [TENSORS, METADATA]
        return Path(snapshot_download(str(folder), revision=revision, token=token, allow_patterns=files))
    except Exception as error:  # the client's exceptions share no base class
        reason = scrub(f"{type(error).__name__}: {error}", token)
        raise StatisticsError(f"cannot get statistics {str(folder)!r} from the Hub ({reason})") from None


def _read_metadata(path: Path) -> dict[str, Any]:
    for name in (METADATA, TENSORS):
        if not (path / name).is_file():
            raise StatisticsError(f"{path} is not a statistics folder: {name} is missing")
    try:
        content = json.loads((path / METADATA).read_text(encoding="utf-8"))
        found, _ = int(content["format_version"]), content["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise StatisticsError(f"{path / METADATA} cannot be read ({error!r}); collect again") from error
    if found > FORMAT_VERSION:
        raise StatisticsError(
            f"{path} has format {found}, newer than this version's {FORMAT_VERSION}: update hf-unlearn"
        )
    return content
