"""Methods x constraints x seeds, cell by cell; a finished cell is a file, and is never run again.

A cell's file is named by its method, constraint, seed and a hash of every setting that it was run with, so that other
settings make other cells beside it. What it was run on (weights and forget rows) is recorded and compared.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from hf_unlearn.constraints.registry import CONSTRAINTS, needs_fisher
from hf_unlearn.core.files import write_json
from hf_unlearn.core.processes import gather, is_main, wait_for_all
from hf_unlearn.data.row_identity import row_key
from hf_unlearn.deletion.arguments import BenchmarkArguments
from hf_unlearn.deletion.prepare import prepare
from hf_unlearn.deletion.request import Request
from hf_unlearn.errors import CoverageError, DataError, ModelError, NonFiniteLossError, OutputError, SettingsError
from hf_unlearn.evaluation.attacks.auditing import AuditSettings, audit
from hf_unlearn.evaluation.lm_eval import harness_metrics
from hf_unlearn.evaluation.report import MetricValue, UnlearningReport, plain
from hf_unlearn.losses import LOSSES
from hf_unlearn.models.fingerprint import weights_fingerprint
from hf_unlearn.statistics.sketch import SKETCH_ABOVE, SKETCH_RANK
from hf_unlearn.trainer.config import UnlearningConfig
from hf_unlearn.trainer.trainer import UnlearningTrainer

CELLS = "cells"
# Settings that say where things are or how fast, and change no result.
_ELSEWHERE = {
    "output_dir", "overwrite_output_dir", "cache_dir", "methods", "constraints", "seeds", "cell_settings",
    "disable_tqdm", "report_to", "logging_dir", "run_name", "hub_model_id", "hub_token", "local_rank",
}  # fmt: skip

# Defaults of settings that came after the first grids, whose cells they must not make anew.
_LATER = {"sketch_above": SKETCH_ABOVE, "sketch_rank": SKETCH_RANK}


@dataclass(frozen=True, eq=False)
class Cell:
    """One run of the grid.

    Attributes:
        method: Name of the loss.
        constraint: Name of the constraint.
        seed: Of the order of rows, and of the models where they are made.
        args, config: What it is run with.
    """

    method: str
    constraint: str
    seed: int
    args: BenchmarkArguments
    config: UnlearningConfig

    @property
    def name(self) -> str:
        return f"{self.method}, {self.constraint}, seed {self.seed}"

    @property
    def file(self) -> str:
        settings = {**plain(self.config.to_dict()), **plain(asdict(self.args))}
        # what is off is left out: a setting that a later version adds, off by default, makes no other cells
        kept = {n: value for n, value in settings.items() if value and n not in _ELSEWHERE and _LATER.get(n) != value}
        digest = sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
        return f"{self.method}-{self.constraint}-{self.seed}-{digest[:12]}.json".replace(":", ".")


@dataclass(frozen=True)
class Results:
    """What a grid found: reports of finished cells, and why others have none.

    Attributes:
        reports: By cell.
        failed: One line by cell; it is tried again at the next call.
    """

    reports: Mapping[Cell, UnlearningReport]
    failed: Mapping[Cell, str]


def cells(args: BenchmarkArguments, config: UnlearningConfig) -> list[Cell]:
    """The grid that is asked for, seed by seed.

    Raises:
        SettingsError: An unknown method, constraint or setting, or a malformed seed.
    """
    methods, constraints = _names(args.methods, "methods"), _names(args.constraints or "all", "constraints")
    constraints = list(CONSTRAINTS) if constraints == ["all"] else constraints
    if config.push_to_hub:
        raise SettingsError("a benchmark publishes nothing; make the model that you want with run, and push that")
    overrides, made = _overrides(args, methods, constraints), []
    for seed in _seeds(args.seeds):
        own = replace(args, fine_tune_seed=args.fine_tune_seed + seed)
        for method in methods:
            for constraint in constraints:
                names = (method, constraint, f"{method}/{constraint}")
                changes = {key: value for name in names for key, value in overrides.get(name, {}).items()}
                made.append(Cell(method, constraint, seed, own, _config(config, method, constraint, seed, changes)))
    return made


def _config(
    config: UnlearningConfig, method: str, constraint: str, seed: int, changes: Mapping[str, Any]
) -> UnlearningConfig:
    """The settings of a cell: those of the loss and the constraint are kept where it is the one that they are of."""
    own: dict[str, Any] = {"loss": method, "constraint": constraint, "seed": config.seed + seed, "disable_tqdm": True}
    if method != config.loss:
        own["loss_settings"] = None
    if constraint != config.constraint:
        own["constraint_settings"] = own["layer_constraints"] = None
    try:
        return config.but(**(own | dict(changes)))
    except TypeError as error:
        raise SettingsError(f"cell_settings of {method}/{constraint}: {str(error).splitlines()[0]}") from error


def _overrides(
    args: BenchmarkArguments, methods: Sequence[str], constraints: Sequence[str]
) -> Mapping[str, Mapping[str, Any]]:
    given: Any = args.cell_settings or {}
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise SettingsError(f"cell_settings must be JSON of the form {{...}}: {error}") from error
    if not isinstance(given, dict) or not all(isinstance(value, dict) for value in given.values()):
        raise SettingsError('cell_settings must be of the form {"npo": {"learning_rate": 1e-3}}')
    known = {*LOSSES, *CONSTRAINTS, *methods, *(f"{m}/{c}" for m in methods for c in constraints)}
    if unknown := sorted(set(given) - known):
        raise SettingsError(f"cell_settings name no method, constraint or METHOD/CONSTRAINT: {', '.join(unknown)}")
    return given


def _names(text: str, what: str) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise SettingsError(f"no {what} were named; pass --{what} with one or more, with commas")
    return names


def _seeds(text: str) -> list[int]:
    try:
        return [int(seed) for seed in _names(str(text), "seeds")]
    except ValueError:
        raise SettingsError(f"seeds must be whole numbers with commas, such as 0,1,2; got {text!r}") from None


def run_grid(args: BenchmarkArguments, config: UnlearningConfig, folder: Path) -> Results:
    """Run what is not finished yet, and read the rest; one cell's failure is told and does not end the others.

    Raises:
        SettingsError: As `cells`.
        OutputError: `folder` has something else in it, a damaged cell, or cells of other weights or rows.
    """
    grid = cells(args, config)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / CELLS).is_dir():
        raise OutputError(f"{folder} is not empty and has no results of a benchmark; choose another --output_dir")
    wait_for_all()
    if is_main():
        (folder / CELLS).mkdir(parents=True, exist_ok=True)
    wait_for_all()
    reports: dict[Cell, UnlearningReport] = {}
    failed: dict[Cell, str] = {}
    bar = tqdm(total=len(grid), unit="cell", disable=config.disable_tqdm or not is_main())
    for part in _together(grid):
        workplace = _Workplace(part, folder)
        for cell in part:
            bar.set_description(cell.name)
            path = folder / CELLS / cell.file
            if gather(path.is_file())[0] or not (reason := workplace.run(cell, path)):
                reports[cell] = UnlearningReport.load(path)
            else:
                failed[cell] = reason
            bar.update()
    bar.close()
    _require_alike(reports)
    return Results({cell: reports[cell] for cell in grid if cell in reports}, failed)


def _together(grid: Sequence[Cell]) -> Iterator[list[Cell]]:
    """Cells that share models, rows and statistics: of one seed, and with the same alternate answers."""
    groups: dict[tuple[int, str], list[Cell]] = {}
    for cell in grid:
        groups.setdefault((cell.seed, cell.config.build_loss().kind.alternate_answer), []).append(cell)
    yield from groups.values()


class _Workplace:
    """Models, rows and statistics of some cells, loaded or made when the first of them is run."""

    def __init__(self, part: Sequence[Cell], folder: Path):
        self.first = part[0]
        self.fisher = any(needs_fisher(cell.constraint) for cell in part)
        self.folder = folder
        self.request: Request | None = None
        self.attacked: list[MetricValue] | None = None
        self.asked: list[MetricValue] | None = None
        self.about: dict[str, str] = {}

    def run(self, cell: Cell, path: Path) -> str:
        """Unlearn, judge and attack; the file appears at the end. Returns why it was not possible, or nothing."""
        request, target = self._prepared(), self.folder / CELLS / path.stem
        try:
            with request.unlearned(cell.config, target) as (trainer, report):
                report.metrics += self._attacks(cell, trainer) + self._harness(cell, trainer)
        except (SettingsError, DataError, ModelError, CoverageError, NonFiniteLossError) as error:
            return str(error)
        report.request |= self.about
        if is_main():
            write_json(path, report.content())
        wait_for_all()
        return ""

    def _prepared(self) -> Request:
        if self.request is None:
            args = replace(self.first.args, constraints=None)
            self.request = prepare(args, self.first.config, fisher=self.fisher)
            keys = sorted(row_key(row) for row in self.request.forget)
            self.about = {
                "weights": weights_fingerprint(self.request.model),
                "forget_rows": sha256(b"".join(keys)).hexdigest(),
            }
        return self.request

    def _attacks(self, cell: Cell, trainer: UnlearningTrainer) -> list[MetricValue]:
        """The attacks asked for; the retrained model is attacked once."""
        request, args = self._prepared(), cell.args
        if not args.attacks or args.attacks == "none":
            return []
        settings = AuditSettings(
            args.relearn_rows, args.relearn_steps, args.relearn_learning_rate, shots=args.shots, seed=cell.seed
        )
        first = self.attacked is None
        found = audit(
            trainer.model, request.splits, original=trainer.original_model,
            retrained=request.retrained if first else None, attacks=_names(args.attacks, "attacks"), settings=settings,
            processing_class=request.processing_class, collator=request.collator,
            batch_size=cell.config.per_device_eval_batch_size,
        ).metrics  # fmt: skip
        if self.attacked is None:
            self.attacked = [metric for metric in found if metric.model == "retrained"]
        return [metric for metric in found if metric.model != "retrained"] + self.attacked

    def _harness(self, cell: Cell, trainer: UnlearningTrainer) -> list[MetricValue]:
        """Tasks of lm-evaluation-harness; the original and the retrained model are judged once."""
        request, args = self._prepared(), cell.args
        if not args.lm_eval_tasks:
            return []

        def judge(model: nn.Module, name: str) -> list[MetricValue]:
            return harness_metrics(
                model, request.processing_class, _names(args.lm_eval_tasks or "", "lm_eval_tasks"), name=name,
                batch_size=cell.config.per_device_eval_batch_size, include_path=args.lm_eval_include_path,
                limit=args.lm_eval_limit,
            )  # fmt: skip

        if self.asked is None:
            with trainer.original_model() as original:
                self.asked = judge(original, "original")
            if request.retrained is not None:
                self.asked += judge(request.retrained, "retrained")
        return judge(trainer.model, "unlearned") + self.asked


def _require_alike(reports: Mapping[Cell, UnlearningReport]) -> None:
    """Raise `OutputError` where cells of one seed were run on different weights or rows: the table would mix them."""
    seen: dict[int, tuple[Cell, Any]] = {}
    for cell, report in reports.items():
        about = (report.request.get("weights"), report.request.get("forget_rows"))
        first, other = seen.setdefault(cell.seed, (cell, about))
        if other != about:
            raise OutputError(
                f"the cells ({first.name}) and ({cell.name}) were run on different weights or forget rows; choose "
                f"another --output_dir, or remove the older of {first.file} and {cell.file}"
            )
