"""Scores on tasks of lm-evaluation-harness (optional extra `lm-eval`): WMDP, MMLU and its other tasks."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, TypedDict

from torch import nn

from hf_unlearn.core.processes import world
from hf_unlearn.core.text import one_line
from hf_unlearn.errors import SettingsError
from hf_unlearn.evaluation.report import MetricValue
from hf_unlearn.models.modes import eval_mode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPLIT = "lm_eval"

HarnessResults = TypedDict(
    "HarnessResults",
    {"results": dict[str, dict[str, float | str]], "n-samples": dict[str, dict[str, int]]},
    total=False,
)
"""What is read of the results of `lm_eval.simple_evaluate`: numbers and row counts by task."""


def harness_metrics(
    model: nn.Module,
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[str],
    *,
    batch_size: int = 16,
    include_path: str | None = None,
    limit: int | None = None,
    name: str = "unlearned",
) -> list[MetricValue]:
    """Evaluate the tasks and return every number as the metric `{task}_{number}` on the split `lm_eval`.

    Intervals are the value plus and minus 1.96 standard errors, which the harness estimates.

    Args:
        model: A causal language model; its weights and mode are unchanged.
        tokenizer: Its tokenizer.
        tasks: Names of tasks or groups.
        batch_size: Questions per forward pass.
        include_path: Folder of further task files.
        limit: Largest number of questions of each task.
        name: The model's name in the report: `original`, `unlearned` or `retrained`.

    Raises:
        SettingsError: The harness is not installed, a task is unknown, its data cannot be loaded, or there are several
            processes.
    """
    if find_spec("lm_eval") is None:
        raise SettingsError("lm_eval_tasks need lm-evaluation-harness: pip install 'hf_unlearn[lm-eval]'")
    if world()[1] > 1:
        raise SettingsError("lm_eval_tasks run on one process only; start one process, or leave them out")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise SettingsError(f"lm-evaluation-harness has no task {', '.join(unknown)}; see lm_eval ls tasks")
    try:
        with eval_mode(model):
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            evaluated: HarnessResults = simple_evaluate(
                wrapped,
                tasks=list(tasks),
                task_manager=manager,
                limit=limit,
                bootstrap_iters=1000,
                log_samples=False,
                verbosity="ERROR",
            )
    except (OSError, ConnectionError) as error:  # the harness downloads its data sets from the Hub
        raise SettingsError(f"lm-evaluation-harness cannot load a task's data: {one_line(error)}") from error
    counts = evaluated.get("n-samples", {})
    return [
        metric
        for task, numbers in evaluated["results"].items()
        for metric in _metrics(task, numbers, counts.get(task, {}), name)
    ]


def _metrics(task: str, numbers: Mapping[str, float | str], counts: Mapping[str, int], model: str) -> list[MetricValue]:
    """Return the numbers of one task; the harness names them `number,filter` and `number_stderr,filter`."""
    n = int(counts.get("effective", numbers.get("sample_len", 0)))
    metrics = []
    for key, value in numbers.items():
        number, _, answer_filter = key.partition(",")
        if not answer_filter or number.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = numbers.get(f"{number}_stderr,{answer_filter}")
        low, high = (value - 1.96 * error, value + 1.96 * error) if isinstance(error, (int, float)) else (None, None)
        label = f"{task}_{number}" + ("" if answer_filter == "none" else f"_{answer_filter}")
        metrics.append(MetricValue(label, float(value), SPLIT, model, n, low, high))
    return metrics
