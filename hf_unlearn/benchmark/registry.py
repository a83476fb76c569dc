"""The field's benchmarks by name: data, models, settings and metrics of each, which a YAML file or flags override.

A benchmark is one entry of `BENCHMARKS`. The grid of methods, constraints and seeds is run by `benchmarks.grid`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

METHODS = "grad_ascent,grad_diff,npo,simnpo,rmu,idk,undial,pgu,next_best"
CLASSIFIER_METHODS = "grad_ascent,grad_diff,npo,random_label,undial,pgu,next_best"
CONSTRAINTS = "none,energy,ridge,kronecker"
OPEN_UNLEARNING = "open-unlearning, docs/repro.md (untuned, as it says)"


@dataclass(frozen=True)
class Column:
    """One number of the table: a metric on a split, under a short title; small values are written as powers of ten."""

    title: str
    metric: str
    split: str


@dataclass(frozen=True)
class Published:
    """Numbers that others published, by method, in the order of `columns` (titles of the benchmark's columns)."""

    about: str
    source: str
    columns: tuple[str, ...]
    rows: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Benchmark:
    """What is compared, and how.

    Attributes:
        about: One line.
        defaults: Settings of `BenchmarkArguments` and `UnlearningConfig`.
        columns: The table.
        frontiers: Panels of the plot: titles of the columns on the horizontal (utility) and the vertical axis
            (forgetting).
        published: Numbers to stand beside.
    """

    about: str
    defaults: Mapping[str, Any]
    columns: tuple[Column, ...]
    frontiers: tuple[tuple[str, str], ...]
    published: tuple[Published, ...] = field(default=())


_COMMON = {"constraints": CONSTRAINTS, "attacks": "relearning", "use_retain_rows": True, "seeds": "0,1,2"}
_TEXT_AUDIT = (
    Column("forget probability", "answer_probability", "forget"),
    Column("retain probability", "answer_probability", "retain"),
    Column("membership AUC", "membership_auc", "forget"),
    Column("relearned", "relearned_probability", "forget"),
)
_CLASSES = (
    Column("forget accuracy", "accuracy", "forget"),
    Column("retain accuracy", "accuracy", "retain"),
    Column("held-out accuracy", "accuracy", "holdout"),
    Column("average gap", "average_gap", "forget"),
    Column("membership AUC", "membership_auc", "forget"),
    Column("MIA-efficacy", "membership_efficacy", "forget"),
    Column("relearned", "relearned_accuracy", "forget"),
)
_TOFU_COLUMNS = ("forget quality", "model utility")
_MUSE_COLUMNS = ("KnowMem", "VerbMem", "PrivLeak", "utility")

BENCHMARKS: dict[str, Benchmark] = {
    "tofu": Benchmark(
        "fictitious authors (Maini et al., COLM 2024, arXiv 2401.06121)",
        {
            **_COMMON,
            "model_name_or_path": "open-unlearning/tofu_Llama-3.2-1B-Instruct_full",
            "retrained": "open-unlearning/tofu_Llama-3.2-1B-Instruct_retain90",
            "dataset_name": "locuslab/TOFU",
            "train": "full",
            "forget": "forget10_perturbed",
            "holdout": "holdout10",
            "eval_splits": "retain_perturbed,real_authors_perturbed,world_facts_perturbed",
            "methods": METHODS,
            "metrics": "forget_quality,model_utility,answer_probability,membership_auc",
        },
        (
            Column("forget quality", "forget_quality", "forget"),
            Column("model utility", "model_utility", "retain_perturbed"),
            *_TEXT_AUDIT,
        ),
        (("model utility", "forget quality"), ("retain probability", "forget probability")),
        (
            Published(
                "Llama-3.2-1B-Instruct, forget10", OPEN_UNLEARNING, _TOFU_COLUMNS,
                {
                    "original": (1.66e-21, 0.6), "retrained": (1.0, 0.59), "grad_ascent": (1.06e-239, 0.0),
                    "grad_diff": (1.06e-239, 0.49), "idk": (4.64e-12, 0.23), "npo": (0.02, 0.46),
                    "simnpo": (2.47e-203, 0.54), "rmu": (3.15e-15, 0.59),
                },
            ),
            Published(
                "Llama-3.2-1B-Instruct, forget01", OPEN_UNLEARNING, _TOFU_COLUMNS,
                {
                    "original": (0.01, 0.6), "retrained": (1.0, 0.6), "grad_ascent": (0.27, 0.33),
                    "grad_diff": (0.77, 0.43), "idk": (0.01, 0.51), "npo": (0.92, 0.56), "simnpo": (0.58, 0.46),
                    "rmu": (0.16, 0.55),
                },
            ),
        ),
    ),
    "muse": Benchmark(
        "news articles (Shi et al., ICLR 2025, arXiv 2407.06460)",
        {
            **_COMMON,
            "model_name_or_path": "muse-bench/MUSE-News_target",
            "retrained": "muse-bench/MUSE-News_retrain",
            "dataset_name": "muse-bench/MUSE-News",
            "train": "raw/forget,raw/retain1",
            "forget": "raw/forget",
            "holdout": "privleak/holdout",
            "eval_splits": "forget_verbmem=verbmem/forget,forget_knowmem=knowmem/forget_qa,"
            "retain_knowmem=knowmem/retain_qa",
            "max_length": 2048,
            "methods": "grad_ascent,grad_diff,npo,simnpo,rmu,undial,pgu,next_best",
            "metrics": "muse,answer_probability,membership_auc",
        },
        (
            Column("VerbMem", "verbatim_memorisation", "forget_verbmem"),
            Column("KnowMem", "knowledge_memorisation", "forget_knowmem"),
            Column("PrivLeak", "priv_leak", "forget"),
            Column("utility", "knowledge_utility", "retain_knowmem"),
            *_TEXT_AUDIT,
        ),
        (("utility", "KnowMem"), ("utility", "VerbMem")),
        (
            Published(
                "Llama-2-7B, MUSE-News", OPEN_UNLEARNING, _MUSE_COLUMNS,
                {
                    "original": (0.64, 0.58, -99.81, 0.56), "retrained": (0.33, 0.20, 0.0, 0.56),
                    "grad_ascent": (0.0, 0.0, 52.11, 0.0), "grad_diff": (0.41, 8.92e-3, 93.23, 0.37),
                    "npo": (0.56, 0.35, -86.0, 0.51), "simnpo": (0.54, 0.36, -86.11, 0.51),
                    "rmu": (0.48, 0.05, 56.36, 0.51),
                },
            ),
        ),
    ),
    "wmdp": Benchmark(
        "hazardous knowledge (Li et al., ICML 2024, arXiv 2403.03218); judged by lm-evaluation-harness",
        {
            **_COMMON,
            "model_name_or_path": "HuggingFaceH4/zephyr-7b-beta",
            "dataset_name": "cais/wmdp-corpora",
            "train": "cyber-forget-corpus,cyber-retain-corpus",
            "forget": "cyber-forget-corpus",
            "methods": "grad_ascent,grad_diff,npo,simnpo,rmu,undial,pgu,next_best",
            "metrics": "answer_probability",
            "lm_eval_tasks": "wmdp_cyber,mmlu",
        },
        (
            Column("wmdp_cyber", "wmdp_cyber_acc", "lm_eval"),
            Column("mmlu", "mmlu_acc", "lm_eval"),
            *(column for column in _TEXT_AUDIT if column.metric != "membership_auc"),
        ),
        (("mmlu", "wmdp_cyber"), ("retain probability", "forget probability")),
    ),
    "images": Benchmark(
        "500 of 50,000 images of CIFAR-10, on a vision transformer made to know them",
        {
            **_COMMON,
            "task": "image-classification",
            "model_name_or_path": "google/vit-base-patch16-224-in21k",
            "fine_tune": True,
            "fine_tune_epochs": 3.0,
            "fine_tune_learning_rate": 5e-5,
            "fine_tune_batch_size": 32,
            "retrained": "auto",
            "dataset_name": "uoft-cs/cifar10",
            "train": "train",
            "forget": "train[0:500]",
            "holdout": "test",
            "methods": CLASSIFIER_METHODS,
            "metrics": "accuracy,average_gap,membership_auc,membership_efficacy",
        },
        _CLASSES,
        (("retain accuracy", "average gap"),),
    ),
    "text": Benchmark(
        "5% of the rows of SST-2, on a sentence encoder made to know them",
        {
            **_COMMON,
            "task": "text-classification",
            "model_name_or_path": "sentence-transformers/all-MiniLM-L6-v2",
            "fine_tune": True,
            "fine_tune_epochs": 3.0,
            "fine_tune_learning_rate": 1e-4,
            "fine_tune_batch_size": 32,
            "retrained": "auto",
            "dataset_name": "stanfordnlp/sst2",
            "train": "train[0:6920]",
            "forget": "train[0:346]",
            "holdout": "validation",
            "methods": CLASSIFIER_METHODS,
            "metrics": "accuracy,average_gap,membership_auc,membership_efficacy",
        },
        _CLASSES,
        (("retain accuracy", "average gap"),),
    ),
}  # fmt: skip
