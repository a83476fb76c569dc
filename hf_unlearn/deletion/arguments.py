"""The settings of a run: fields that are flags of the command line and settings of its YAML files."""

from dataclasses import dataclass

from hf_unlearn.core.settings import setting
from hf_unlearn.models.tasks import Task


@dataclass
class DataArguments:
    """Which model and which rows."""

    model_name_or_path: str = setting("", "Folder or Hub id of a model.")
    dataset_name: str = setting(
        "", "Folder of JSON lines or Parquet files, one file per split, or Hub id of a data set."
    )
    max_rows: int | None = setting(
        None, "Evaluate on at most this many rows of each split; run and benchmark evaluate on all forget rows."
    )
    cache_dir: str | None = setting(None, "Where prepared models and statistics are kept; default HF_HOME/hf_unlearn.")
    task: Task | None = setting(
        None, "What the model does; default: what its configuration says. Needed to train a new head with fine_tune."
    )


@dataclass
class RunArguments(DataArguments):
    """What to forget, and what to compare with.

    Splits are `name` or `name[start:stop]`, several with commas; `config/name` is a split of one configuration of a Hub
    data set, or a file in a subfolder.

    >>> from hf_unlearn.deletion import RunArguments
    >>> RunArguments(model_name_or_path="model", dataset_name="data", train="full", forget="full[0:40]").forget
    'full[0:40]'
    """

    train: str = setting("", "Split that the model was, or will be, trained on; it includes the forget rows.")
    forget: str = setting("", "Split to forget.")
    forget_filter: str | None = setting(
        None,
        "Forget only the matching rows of that split (default: of train), such as 'author == \"A\"'; also !=, <, in, "
        "contains, joined by and.",
    )
    forget_indices: str | None = setting(
        None, "Forget only the rows with the numbers in this file: a JSON list, or one number per line."
    )
    forget_request: str | None = setting(
        None,
        "Forget only the rows in this file of JSON lines: complete rows, or values that select rows, such as "
        '{"id": 7}.',
    )
    retain: str | None = setting(None, "Split to evaluate retained knowledge on; default: train without forget.")
    holdout: str | None = setting(None, "Split that the model never saw; early stopping compares with it.")
    eval_splits: str | None = setting(
        None, "Further splits to evaluate on; name=split gives a split another name in the report."
    )
    use_retain_rows: bool = setting(
        False, "Use the retain rows in the loss; if false, no retain row is read while unlearning."
    )
    statistics: str | None = setting(
        None, "Folder or Hub id of statistics; default: they are collected on the train split."
    )
    subtract_forget: bool = setting(True, "The statistics include the forget rows: subtract theirs.")
    fine_tune: bool = setting(
        False,
        "Fine-tune the model on the train split first, so that it knows the rows; a base model gets a new head.",
    )
    num_labels: int | None = setting(
        None, "Number of classes of a new head that fine_tune trains; default: the classes of the rows."
    )
    fine_tune_epochs: float = setting(5.0, "Epochs of the fine-tune.")
    fine_tune_learning_rate: float = setting(2e-4, "Peak learning rate of the fine-tune (AdamW, linear decay).")
    fine_tune_batch_size: int = setting(10, "Batch size of the fine-tune.")
    retrained: str | None = setting(
        None,
        "Model trained without the forget rows: a folder or Hub id, 'none', or 'auto' to fine-tune one (run and "
        "benchmark).",
    )
    constraints: str | None = setting(
        None, "Run several constraints from the same original, with commas, or 'all'; each has a folder in output_dir."
    )
    metrics: str | None = setting(
        None, "Metrics to report, or suites of them (default, tofu, muse, attacks), with commas."
    )
    use_peft: bool = setting(False, "Train a LoRA adapter instead of the weights.")
    lora_r: int = setting(16, "Rank of the adapter.")
    lora_alpha: int = setting(32, "Scale of the adapter: the update is multiplied by alpha over rank.")
    lora_dropout: float = setting(0.0, "Dropout of the adapter.")
    lora_target_modules: list[str] = setting([], "Names of the modules to adapt; default: all linear ones.")
    use_rslora: bool = setting(False, "Scale by alpha over the square root of the rank.")
    merge_adapter: bool = setting(False, "Write the merged model instead of the adapter.")
    samples: int | None = setting(
        None,
        "Show this many answers before and after unlearning, also in the report and on the card: only for rows that "
        "may be published. Default: 3 of a language model, in the terminal only.",
    )
    fine_tune_seed: int = setting(0, "Seed of the fine-tunes.")
    license: str | None = setting(
        None, "Licence for the metadata of the card, as the Hub names it; default: that of a local base model's card."
    )
    language: str | None = setting(
        None, "Languages for the metadata of the card, with commas, such as en,de; default: as for the licence."
    )
    ledger: str | None = setting(
        None,
        "Folder of the ledger that records this request. The first request makes it. Later ones start from the last "
        "request's model and statistics (pass --statistics only if they were collected again on that model), test all "
        "earlier forget sets again, count max_retain_drift over all requests, and stop at the forget metric that "
        "held-out rows had before the first request.",
    )
    ledger_key_file: str | None = setting(
        None, "File with the ledger's key, outside the ledger; default: the variable HF_UNLEARN_LEDGER_KEY."
    )
    forget_again: bool = setting(
        False, "Also train on the rows of a ledger's earlier requests, if they are available: they may come back."
    )
    energy_step: float = setting(0.0, "Energy that each later request of a ledger protects more than the one before.")


@dataclass
class AttackArguments(RunArguments):
    """How hard to attack; see `AuditSettings`."""

    attacks: str | None = setting(
        None, "Attacks to run, with commas; default: all that the model and the rows allow. An unknown name lists them."
    )
    relearn_rows: int = setting(5, "Forget rows that the attacker trains on; the model is evaluated on the others.")
    relearn_steps: int = setting(8, "Steps of that training.")
    relearn_learning_rate: float = setting(2e-5, "Learning rate of that training (AdamW).")
    shots: int = setting(3, "Other rows shown before each forget row.")


@dataclass
class BenchmarkArguments(AttackArguments):
    """A grid of methods, constraints and seeds. A benchmark sets defaults; a YAML file or flags override them."""

    methods: str = setting("", "Losses to compare, with commas.")
    seeds: str = setting(
        "0,1,2", "Seeds, with commas; each makes an original and a retrained model of its own, if they are made."
    )
    cell_settings: dict | str | None = setting(
        None,
        "Settings that differ by method, constraint or METHOD/CONSTRAINT, as JSON such as "
        '{"npo": {"learning_rate": 1e-3}, "none": {"num_train_epochs": 5}}; the longer name wins.',
    )
    lm_eval_tasks: str | None = setting(
        None,
        "Tasks of lm-evaluation-harness to evaluate each model on too, with commas, such as wmdp_bio,mmlu.",
    )
    lm_eval_include_path: str | None = setting(None, "Folder of further task files of lm-evaluation-harness.")
    lm_eval_limit: int | None = setting(None, "Use at most this many questions of each task.")
