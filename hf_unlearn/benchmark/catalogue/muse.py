"""MUSE: news articles."""

from hf_unlearn.benchmark.catalogue.shared import COMMON_DEFAULTS, OPEN_UNLEARNING, TEXT_COLUMNS
from hf_unlearn.benchmark.registry import Benchmark, Column, Published, register_benchmark

_MUSE_COLUMNS = ("KnowMem", "VerbMem", "PrivLeak", "utility")

register_benchmark(
    "muse",
    Benchmark(
        about="news articles (Shi et al., ICLR 2025, arXiv 2407.06460)",
        defaults={
            **COMMON_DEFAULTS,
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
        columns=(
            Column("VerbMem", "verbatim_memorisation", "forget_verbmem"),
            Column("KnowMem", "knowledge_memorisation", "forget_knowmem"),
            Column("PrivLeak", "priv_leak", "forget"),
            Column("utility", "knowledge_utility", "retain_knowmem"),
            *TEXT_COLUMNS,
        ),
        frontiers=(("utility", "KnowMem"), ("utility", "VerbMem")),
        published=(
            Published(
                "Llama-2-7B, MUSE-News",
                OPEN_UNLEARNING,
                _MUSE_COLUMNS,
                {
                    "original": (0.64, 0.58, -99.81, 0.56),
                    "retrained": (0.33, 0.20, 0.0, 0.56),
                    "grad_ascent": (0.0, 0.0, 52.11, 0.0),
                    "grad_diff": (0.41, 8.92e-3, 93.23, 0.37),
                    "npo": (0.56, 0.35, -86.0, 0.51),
                    "simnpo": (0.54, 0.36, -86.11, 0.51),
                    "rmu": (0.48, 0.05, 56.36, 0.51),
                },
            ),
        ),
    ),
)
