"""The text demonstration: a chat model learns five invented people, then forgets one."""

from pathlib import Path

from hf_unlearn.deletion.arguments import RunArguments
from hf_unlearn.deletion.run import run
from hf_unlearn.errors import SettingsError
from hf_unlearn.evaluation.report import UnlearningReport
from hf_unlearn.trainer.config import UnlearningConfig

ROWS_A_PERSON, KNOWN, NEVER_SEEN = 20, 5, 2
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
    """Fine-tune `model` on five people of 20 rows each, forget `person:P` (1 to 5), judge against a retrained model.

    Raises:
        SettingsError: A request that cannot be read.
        ModelError: The model cannot be loaded.
    """
    kind, _, value = forget.partition(":")
    if kind != "person" or value not in map(str, range(1, KNOWN + 1)):
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
    return run(
        arguments,
        UnlearningConfig(output_dir, overwrite_output_dir=overwrite, per_device_eval_batch_size=10, seed=seed),
    )
