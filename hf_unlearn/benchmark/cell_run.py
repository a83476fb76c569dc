"""Running the cells of a grid that share models, rows and statistics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from torch import nn

from hf_unlearn.benchmark.cell import Cell
from hf_unlearn.constraints.registry import needs_fisher
from hf_unlearn.data.formats import rows_of
from hf_unlearn.data.row_identity import row_hash
from hf_unlearn.deletion.build import build_request
from hf_unlearn.deletion.fulfil import PreparedRequest, UnlearnedModel, prepare_request
from hf_unlearn.deletion.references import ReferenceResults
from hf_unlearn.errors import CoverageError, DataError, ModelError, NonFiniteLossError, SettingsError
from hf_unlearn.evaluation.attacks.auditing import AuditSettings, audit
from hf_unlearn.evaluation.lm_eval import harness_metrics
from hf_unlearn.evaluation.report import MetricValue, UnlearningReport
from hf_unlearn.models.fingerprint import weights_fingerprint

CELL_ERRORS = (SettingsError, DataError, ModelError, CoverageError, NonFiniteLossError)
"""Errors of one cell, which do not end the others."""


@dataclass(frozen=True)
class CellFailure:
    """Why a cell has no report, in one line."""

    reason: str


@dataclass(frozen=True)
class GroupReferences:
    """What is measured with the first cell of a group, and is the same for the others.

    Attributes:
        results: Metrics of the original and the retrained model.
        attacks: Attacks on the retrained model.
        lm_eval: Numbers of lm-evaluation-harness on the original and the retrained model.
    """

    results: ReferenceResults
    attacks: Sequence[MetricValue]
    lm_eval: Sequence[MetricValue]


def groups_of(cells: Sequence[Cell]) -> list[list[Cell]]:
    """Group the cells that share models, rows and statistics: those of one seed with the same alternate answers."""
    groups: dict[tuple[int, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.seed, cell.config.build_loss().kind.alternate_answer), []).append(cell)
    return list(groups.values())


def run_group(
    group: Sequence[Cell], unfinished: Sequence[Cell], folder: Path
) -> Iterator[tuple[Cell, UnlearningReport | CellFailure]]:
    """Run the unfinished cells of a group, which are loaded and prepared once, and yield their reports.

    Args:
        group: All cells of the group: the statistics have Fishers if one of them needs them, finished or not.
        unfinished: Those to run.
        folder: Where checkpoints of a cell are written.
    """
    if not unfinished:
        return
    first = group[0]
    fisher = any(needs_fisher(cell.constraint) for cell in group)
    request = build_request(replace(first.args, constraints=None), first.config, fisher=fisher)
    prepared = prepare_request(request, first.config)
    provenance = {
        "weights": weights_fingerprint(request.models.original),
        "forget_rows": sha256(b"".join(sorted(row_hash(row) for row in rows_of(request.rows.forget)))).hexdigest(),
    }
    references: GroupReferences | None = None
    for cell in unfinished:
        try:
            report, references = run_cell(cell, prepared, folder, references)
        except CELL_ERRORS as error:
            yield cell, CellFailure(str(error))
            continue
        report.request |= provenance
        yield cell, report


def run_cell(
    cell: Cell, prepared: PreparedRequest, folder: Path, references: GroupReferences | None
) -> tuple[UnlearningReport, GroupReferences]:
    """Unlearn, evaluate and attack; without `references` the reference models are measured too.

    Raises:
        UnlearningError: Whatever keeps the cell from running.
    """
    target = folder / Path(cell.file).stem
    known = None if references is None else references.results
    with prepared.unlearned(cell.config, target, known) as result:
        attacks, reference_attacks = _attack(cell, prepared, result, references)
        lm_eval, reference_lm_eval = _lm_eval(cell, prepared, result, references)
        result.report.metrics += [*attacks, *reference_attacks, *lm_eval, *reference_lm_eval]
        return result.report, GroupReferences(result.references, reference_attacks, reference_lm_eval)


def _attack(
    cell: Cell, prepared: PreparedRequest, result: UnlearnedModel, references: GroupReferences | None
) -> tuple[list[MetricValue], Sequence[MetricValue]]:
    """Run the attacks of the cell; return the results of the unlearned and of the retrained model."""
    models, args = prepared.request.models, cell.args
    if not args.attacks or args.attacks == "none":
        return [], []
    metrics = audit(
        result.trainer.model,
        prepared.request.rows.splits,
        original=result.trainer.original_model,
        retrained=models.retrained if references is None else None,
        attacks=split_names(args.attacks, "attacks"),
        settings=AuditSettings(
            args.relearn_rows, args.relearn_steps, args.relearn_learning_rate, shots=args.shots, seed=cell.seed
        ),
        processing_class=models.processing_class,
        collator=models.collator,
        batch_size=cell.config.per_device_eval_batch_size,
    ).metrics
    of_retrained = [metric for metric in metrics if metric.model == "retrained"]
    return (
        [metric for metric in metrics if metric.model != "retrained"],
        of_retrained if references is None else references.attacks,
    )


def _lm_eval(
    cell: Cell, prepared: PreparedRequest, result: UnlearnedModel, references: GroupReferences | None
) -> tuple[list[MetricValue], Sequence[MetricValue]]:
    """Run tasks of lm-evaluation-harness; return the results of the unlearned and of the reference models."""
    models, args = prepared.request.models, cell.args
    if not args.lm_eval_tasks:
        return [], []
    tasks = split_names(args.lm_eval_tasks, "lm_eval_tasks")

    def measure(model: nn.Module, name: str) -> list[MetricValue]:
        return harness_metrics(
            model,
            models.processing_class,
            tasks,
            name=name,
            batch_size=cell.config.per_device_eval_batch_size,
            include_path=args.lm_eval_include_path,
            limit=args.lm_eval_limit,
        )

    if references is not None:
        return measure(result.trainer.model, "unlearned"), references.lm_eval
    with result.trainer.original_model() as original:
        of_references = measure(original, "original")
    if models.retrained is not None:
        of_references += measure(models.retrained, "retrained")
    return measure(result.trainer.model, "unlearned"), of_references


def split_names(text: str, what: str) -> list[str]:
    """Split names at commas, each once; raises `SettingsError` if there is none.

    >>> split_names("npo, rmu,npo", "methods")
    ['npo', 'rmu']
    """
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise SettingsError(f"{what} names nothing; pass --{what} with one or more names, with commas")
    return names
