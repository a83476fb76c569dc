"""How statistics are collected: one object for the settings that travel together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from accelerate.utils import convert_file_size_to_int

from hf_unlearn.core.storage import Storage
from hf_unlearn.errors import SettingsError
from hf_unlearn.statistics.early_stop import EarlyStop
from hf_unlearn.statistics.sketch import SKETCH_ABOVE, SKETCH_RANK, Sketching


class CollectionConfig(Protocol):
    """The settings of a run that say how statistics are collected, such as those of `UnlearningConfig`."""

    @property
    def keep_statistics_on(self) -> str: ...
    @property
    def max_memory(self) -> str | None: ...
    @property
    def sketch_above(self) -> int: ...
    @property
    def sketch_rank(self) -> int: ...
    @property
    def per_device_eval_batch_size(self) -> int: ...
    @property
    def disable_tqdm(self) -> bool | None: ...


@dataclass(frozen=True)
class CollectionOptions:
    """The options of `collect_statistics`.

    >>> CollectionOptions(fisher=True, max_memory="4GB").max_memory_bytes
    4000000000

    Raises:
        SettingsError: `batch_size`, `max_rows` or `sketch_rank` below 1; a `max_memory` that is not a size; a
            `tolerance` outside (0, 1); an unknown `keep_on`.
    """

    batch_size: int = 8
    """Rows per forward pass; it changes the result only by rounding."""
    fisher: bool = False
    """Also run a backward pass for the Fisher, which two-sided constraints and the predicted KL need."""
    layers: Sequence[str] | None = None
    """Shell patterns of module names; the default and the names are those of `find_layers`."""
    max_rows: int | None = None
    """Stop after this many rows."""
    keep_on: str = "device"
    """Where finished sums are kept: `device`, `cpu`, `disk` (memory-mapped) or `shards` (each process sums its own rows
    of every Gram from the inputs of all processes, and none ever holds a complete one); see `Storage`."""
    max_memory: int | str | None = None
    """Make several passes over the data, each for as many layers as have unfinished sums of this size ("4GB", or bytes)
    on a process. The result is that of one pass."""
    sketch_above: int | None = SKETCH_ABOVE
    """Keep a sketch instead of the Gram (or Fisher) of more features than this; None: no sketches. A sketch adds and
    subtracts as exactly as a Gram does. `summary()` shows the energy that it misses, and every constraint accounts for
    it. Default: 12288 features, whose Gram takes 1.2 GB."""
    sketch_rank: int = SKETCH_RANK
    """Rank of the sketches: how many leading directions they can hold."""
    tolerance: float | None = None
    """Take the rows in random order (a stream in its own order), and stop once doubling them has moved less than this
    share of the energy out of any Gram's leading directions (`EarlyStop`). `summary()` shows the rows used and the last
    change. Nothing can be subtracted from statistics that stopped before the last row."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.max_rows is not None and self.max_rows < 1):
            raise SettingsError(
                f"batch_size and max_rows must be at least 1, got {self.batch_size} and {self.max_rows}"
            )
        self.early_stop(), self.sketching, self.storage, self.max_memory_bytes  # each checks its settings

    @classmethod
    def from_config(cls, config: CollectionConfig, *, fisher: bool = False) -> "CollectionOptions":
        """Return the options that a run's settings (`UnlearningConfig`) describe."""
        return cls(
            fisher=fisher,
            batch_size=config.per_device_eval_batch_size,
            keep_on=config.keep_statistics_on,
            max_memory=config.max_memory,
            sketch_above=config.sketch_above,
            sketch_rank=config.sketch_rank,
            progress=not config.disable_tqdm,
        )

    def early_stop(self) -> EarlyStop | None:
        """Return a new stopping rule; None without a tolerance."""
        return None if self.tolerance is None else EarlyStop(self.tolerance)

    @property
    def sketching(self) -> Sketching:
        """Which Grams and Fishers are sketched."""
        return Sketching(self.sketch_above, self.sketch_rank)

    @property
    def storage(self) -> Storage:
        """Where finished sums are kept."""
        return Storage(self.keep_on)

    @property
    def max_memory_bytes(self) -> int | None:
        """`max_memory` in bytes."""
        if self.max_memory is None:
            return None
        try:
            return convert_file_size_to_int(self.max_memory)
        except ValueError as error:
            raise SettingsError(f"max_memory must be a size such as '4GB', got {self.max_memory!r}") from error

    def settings(self) -> dict[str, Any]:
        """Return the options that decide which sums are collected; they are saved with the statistics."""
        return {
            "fisher": self.fisher,
            "layers": self.layers and list(self.layers),
            "max_rows": self.max_rows,
            "sketch_above": self.sketch_above,
            "sketch_rank": self.sketch_rank,
        }
