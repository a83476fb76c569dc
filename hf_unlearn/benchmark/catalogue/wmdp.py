"""WMDP: hazardous knowledge."""

from hf_unlearn.benchmark.catalogue.shared import COMMON_DEFAULTS, TEXT_COLUMNS
from hf_unlearn.benchmark.registry import Benchmark, Column, register_benchmark

register_benchmark(
    "wmdp",
    Benchmark(
        about="hazardous knowledge (Li et al., ICML 2024, arXiv 2403.03218); measured by lm-evaluation-harness",
        defaults={
            **COMMON_DEFAULTS,
            "model_name_or_path": "HuggingFaceH4/zephyr-7b-beta",
            "dataset_name": "cais/wmdp-corpora",
            "train": "cyber-forget-corpus,cyber-retain-corpus",
            "forget": "cyber-forget-corpus",
            "methods": "grad_ascent,grad_diff,npo,simnpo,rmu,undial,pgu,next_best",
            "metrics": "answer_probability",
            "lm_eval_tasks": "wmdp_cyber,mmlu",
        },
        columns=(
            Column("wmdp_cyber", "wmdp_cyber_acc", "lm_eval"),
            Column("mmlu", "mmlu_acc", "lm_eval"),
            *(column for column in TEXT_COLUMNS if column.metric != "membership_auc"),
        ),
        frontiers=(("mmlu", "wmdp_cyber"), ("retain probability", "forget probability")),
    ),
)
