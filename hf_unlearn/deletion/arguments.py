"""What a run is asked to do: fields that become flags of the command line and settings of its YAML files."""

from dataclasses import dataclass

from hf_unlearn.core.settings import setting
from hf_unlearn.models.tasks import Task


@dataclass
class DataArguments:
    """Which model and which rows."""

    model_name_or_path: str = setting("", "Folder or Hub id of a model.")
    dataset_name: str = setting("", "Folder of JSON lines or Parquet, a file a split, or Hub id of a data set.")
    max_rows: int | None = setting(
        None, "Use at most so many rows of each split for judging; run and benchmark judge all forget rows."
    )
    cache_dir: str | None = setting(None, "Where prepared models and statistics are kept; default HF_HOME/hf_unlearn.")
    task: Task = setting("language-model", "What the model does.")


@dataclass
class RunArguments(DataArguments):
    """What to forget, and what to compare with.

    Splits are `name` or `name[start:stop]`, several with commas; `config/name` is a split of one of a Hub data set's
    configurations, or a file in a subfolder.
    """

    train: str = setting("", "Split that the model was, or is to be, trained on; it includes the forget rows.")
    forget: str = setting("", "Split to forget.")
    forget_filter: str | None = setting(
        None,
        "Forget the rows of that split (default: of train) that fit, such as 'author == \"A\"'; also !=, <, in, "
        "contains, joined by and.",
    )
    forget_indices: str | None = setting(None, "Forget the rows of it that a file numbers: a JSON list, or one a line.")
    forget_request: str | None = setting(
        None, 'Forget the rows of it that a file of JSON lines names: whole rows, or values such as {"id": 7}.'
    )
    retain: str | None = setting(None, "Split to judge retained knowledge on; default: train without forget.")
    holdout: str | None = setting(None, "Split that was never seen; early stopping compares with it.")
    eval_splits: str | None = setting(
        None, "Further splits to judge on; name=split gives one another name in the report."
    )
    use_retain_rows: bool = setting(
        False, "Use the retain rows in the loss; off: no retain row is read while unlearning."
    )
    statistics: str | None = setting(None, "Folder or Hub id of statistics; default: collected on the train split.")
    subtract_forget: bool = setting(True, "The statistics cover the forget rows: subtract theirs.")
    fine_tune: bool = setting(False, "Fine-tune the model on the train split first: it is to be made to know the rows.")
    fine_tune_epochs: float = setting(5.0, "Epochs of that fine-tune.")
    fine_tune_learning_rate: float = setting(2e-4, "Its peak learning rate (AdamW, linear decay).")
    fine_tune_batch_size: int = setting(10, "Its batch size.")
    retrained: str | None = setting(
        None, "Model trained without the forget rows: a folder or Hub id, 'auto' to fine-tune one, or 'none'."
    )
    constraints: str | None = setting(
        None, "Run several from the same original, with commas, or 'all'; a folder each below output_dir."
    )
    metrics: str | None = setting(
        None, "Metrics to report, or suites of them (default, tofu, muse, attacks), with commas."
    )
    use_peft: bool = setting(False, "Train a LoRA adapter instead of the weights.")
    lora_r: int = setting(16, "Its rank.")
    lora_alpha: int = setting(32, "Its scale: the update is multiplied by alpha over rank.")
    lora_dropout: float = setting(0.0, "Its dropout.")
    lora_target_modules: list[str] = setting([], "Names of the modules to adapt; default: all linear ones.")
    use_rslora: bool = setting(False, "Scale by alpha over the square root of the rank.")
    merge_adapter: bool = setting(False, "Write the merged model instead of the adapter.")
    samples: int = setting(0, "Show so many answers before and after; only for rows that may be published.")
    fine_tune_seed: int = setting(0, "Seed of the fine-tunes.")
    ledger: str | None = setting(
        None,
        "Folder of the ledger that records this request. The first one makes it; later ones go on from the last one's "
        "model and statistics (pass --statistics only if they were collected afresh on that model), test all earlier "
        "forget sets again, count max_retain_drift over all requests, and stop by what held-out rows had before the "
        "first.",
    )
    ledger_key_file: str | None = setting(
        None, "File of the ledger's key, kept elsewhere; default: the variable HF_UNLEARN_LEDGER_KEY."
    )
    forget_again: bool = setting(
        False, "Train on the rows of a ledger's earlier requests as well, where they are at hand: they may come back."
    )
    energy_step: float = setting(0.0, "Energy that each later request of a ledger protects more than the one before.")


@dataclass
class AttackArguments(RunArguments):
    """How hard to attack; see `attacks.AuditSettings`."""

    attacks: str | None = setting(
        None,
        "Which, with commas: membership, relearning, relearning_on_other_data, quantisation, recalibration, "
        "paraphrased_prompts, few_shot_prompts, linear_probe, shadow_models.",
    )
    relearn_rows: int = setting(5, "Forget rows that the attacker trains on; the others are judged.")
    relearn_steps: int = setting(8, "Steps of that training.")
    relearn_learning_rate: float = setting(2e-5, "Its learning rate (AdamW).")
    shots: int = setting(3, "Other rows shown before each forget row.")


@dataclass
class BenchmarkArguments(AttackArguments):
    """A grid of methods, constraints and seeds. A benchmark sets defaults; a YAML file or flags override them."""

    methods: str = setting("", "Losses to compare, with commas.")
    seeds: str = setting("0,1,2", "Seeds, with commas; each also makes its own original and retrained model, if made.")
    cell_settings: dict | str | None = setting(
        None,
        "Settings that differ by method, constraint or METHOD/CONSTRAINT, as JSON such as "
        '{"npo": {"learning_rate": 1e-3}, "none": {"num_train_epochs": 5}}; the longer name wins.',
    )
    lm_eval_tasks: str | None = setting(
        None, "Tasks of lm-evaluation-harness to judge each model on too, with commas, such as wmdp_bio,mmlu."
    )
    lm_eval_include_path: str | None = setting(None, "Folder of further task files for it.")
    lm_eval_limit: int | None = setting(None, "Use at most so many questions of each task.")
