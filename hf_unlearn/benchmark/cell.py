"""`Cell`: one run of a grid, and the name of its file."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from hf_unlearn.evaluation.report import plain
from hf_unlearn.statistics.sketch import SKETCH_ABOVE, SKETCH_RANK

if TYPE_CHECKING:
    from hf_unlearn.deletion.arguments import BenchmarkArguments
    from hf_unlearn.trainer.config import UnlearningConfig

_WITHOUT_EFFECT = frozenset(
    "output_dir overwrite_output_dir cache_dir methods constraints seeds cell_settings disable_tqdm report_to "
    "logging_dir run_name hub_model_id hub_token local_rank license language".split()
)
"""Settings that say where files are, what else the grid has, or what is printed; they do not change a result."""

_FORMER_DEFAULTS: dict[str, Any] = {"task": "language-model"}
"""Values that settings had by default in the first grids and are now found out: the names of those cells keep them."""

_ADDED_DEFAULTS: dict[str, Any] = {"sketch_above": SKETCH_ABOVE, "sketch_rank": SKETCH_RANK}
"""Defaults of settings that were added after the first grids: they must not change the names of those cells."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of the grid.

    Attributes:
        method: Name of the loss.
        constraint: Name of the constraint.
        seed: Of the order of rows, and of the models if they are made.
        args: Models, rows, metrics and attacks.
        config: Hyper-parameters.
    """

    method: str
    constraint: str
    seed: int
    args: BenchmarkArguments
    config: UnlearningConfig

    @property
    def name(self) -> str:
        """The cell in words, such as `npo, energy, seed 0`."""
        return f"{self.method}, {self.constraint}, seed {self.seed}"

    @property
    def file(self) -> str:
        """Name of the cell's file, with a hash of the settings that can change its result."""
        settings = {**plain(self.config.to_dict()), **plain(asdict(self.args))}
        settings |= {name: value for name, value in _FORMER_DEFAULTS.items() if settings.get(name) is None}
        # settings that are off are left out: one that a later version adds, off by default, keeps the cell's name
        hashed = {
            name: value
            for name, value in settings.items()
            if value and name not in _WITHOUT_EFFECT and _ADDED_DEFAULTS.get(name) != value
        }
        digest = sha256(json.dumps(hashed, sort_keys=True).encode()).hexdigest()
        return f"{self.method}-{self.constraint}-{self.seed}-{digest[:12]}.json".replace(":", ".")
