"""The text demonstration: a chat model learns five invented people, then forgets one."""

from pathlib import Path

from hf_unlearn.deletion.arguments import RunArguments
from hf_unlearn.deletion.run import run_request
from hf_unlearn.errors import SettingsError
from hf_unlearn.evaluation.report import UnlearningReport
from hf_unlearn.trainer.config import UnlearningConfig

ROWS_A_PERSON, KNOWN, NEVER_SEEN = 20, 5, 2  # people the model learns, and people it never sees
DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
FOLDER = Path(__file__).parent


def run_people(
    output_dir: str,
    forget: str,
    constraint: str | None,
    seed: int,
    model: str = DEFAULT_MODEL,
    overwrite: bool = False,
    cache_dir: str | None = None,
) -> dict[str, UnlearningReport]:
    """Fine-tune a chat model on five invented people of 20 rows each, forget one, and compare with a retrained model.

    Args:
        output_dir: Output folder; several constraints get a folder each inside it.
        forget: `person:1` to `person:5`.
        constraint: Names of constraints with commas, `all` for each of them, or None for the default.
        seed: Seed of fine-tuning and unlearning.
        model: Folder or Hub id of the chat model.
        overwrite: Replace what is in the output folder.
        cache_dir: Where the fine-tuned models and the statistics are kept.

    Returns:
        A report for each constraint.

    Raises:
        SettingsError: A malformed request.
        ModelError: The model cannot be loaded.
    """
    unit, _, value = forget.partition(":")
    if unit != "person" or value not in map(str, range(1, KNOWN + 1)):
        raise SettingsError(f"forget must be person:1 to person:{KNOWN} for the text task, got {forget!r}")
    start = (int(value) - 1) * ROWS_A_PERSON
    known = KNOWN * ROWS_A_PERSON
    arguments = RunArguments(
        model_name_or_path=model,
        dataset_name=str(FOLDER),
        cache_dir=cache_dir,
        train=f"people[0:{known}]",
        forget=f"people[{start}:{start + ROWS_A_PERSON}]",
        holdout=f"people[{known}:{known + NEVER_SEEN * ROWS_A_PERSON}]",
        fine_tune=True,
        retrained="auto",
        constraints=constraint,
        samples=3,
        fine_tune_epochs=6,
        fine_tune_batch_size=5,
        fine_tune_seed=seed,
    )
    config = UnlearningConfig(output_dir, overwrite_output_dir=overwrite, per_device_eval_batch_size=10, seed=seed)
    return run_request(arguments, config)
