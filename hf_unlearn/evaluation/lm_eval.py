"""Accuracy on tasks of lm-evaluation-harness (optional extra `lm-eval`): WMDP, MMLU and what else it knows."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from torch import nn

from hf_unlearn.core.processes import world
from hf_unlearn.errors import SettingsError
from hf_unlearn.evaluation.report import MetricValue
from hf_unlearn.models.modes import eval_mode

SPLIT = "lm_eval"


def harness_metrics(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    batch_size: int = 16,
    include_path: str | None = None,
    limit: int | None = None,
    name: str = "unlearned",
) -> list[MetricValue]:
    """Every number that the harness gives for the tasks, as metrics `{task}_{number}` on the split `lm_eval`.

    Intervals are 1.96 standard errors, as the harness estimates them, to both sides.

    Args:
        model: A causal language model; its weights and mode are left alone.
        tokenizer: Its tokenizer.
        tasks: Names of tasks or groups.
        batch_size: Questions a forward pass.
        include_path: Folder of further task files.
        limit: Use at most so many questions of each task.
        name: What the model is in the report: `original`, `unlearned` or `retrained`.

    Raises:
        SettingsError: The harness is not installed, does not know a task, or cannot load its data; several processes.
    """
    if find_spec("lm_eval") is None:
        raise SettingsError("lm_eval_tasks need lm-evaluation-harness: pip install 'hf_unlearn[lm-eval]'")
    if world()[1] > 1:
        raise SettingsError("lm_eval_tasks are judged on one process; leave them out, or start one")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=include_path)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise SettingsError(f"lm-evaluation-harness knows no task {', '.join(unknown)}; see lm_eval ls tasks")
    try:
        with eval_mode(model):
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            found = simple_evaluate(
                wrapped, tasks=list(tasks), task_manager=manager, limit=limit, bootstrap_iters=1000, log_samples=False,
                verbosity="ERROR",
            )  # fmt: skip
    except (OSError, ConnectionError) as error:  # its data sets come from the Hub
        raise SettingsError(f"lm-evaluation-harness cannot load a task's data: {str(error).splitlines()[0]}") from error
    return [metric for task, numbers in found["results"].items() for metric in _metrics(task, numbers, found, name)]


def _metrics(task: str, numbers: dict[str, Any], found: dict[str, Any], model: str) -> list[MetricValue]:
    counts = found.get("n-samples", {}).get(task, {})
    n = int(counts.get("effective", numbers.get("sample_len", 0)))
    metrics = []
    for key, value in numbers.items():
        number, _, how = key.partition(",")
        if not how or number.endswith("_stderr") or not isinstance(value, (int, float)):
            continue
        error = numbers.get(f"{number}_stderr,{how}")
        bounds = (value - 1.96 * error, value + 1.96 * error) if isinstance(error, (int, float)) else (None, None)
        label = f"{task}_{number}" + ("" if how == "none" else f"_{how}")
        metrics.append(MetricValue(label, float(value), SPLIT, model, n, *bounds))
    return metrics
