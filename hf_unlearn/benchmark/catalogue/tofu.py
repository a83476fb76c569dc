"""TOFU: fictitious authors."""

from hf_unlearn.benchmark.catalogue.shared import COMMON_DEFAULTS, METHODS, OPEN_UNLEARNING, TEXT_COLUMNS
from hf_unlearn.benchmark.registry import Benchmark, Column, Published, register_benchmark

_TOFU_COLUMNS = ("forget quality", "model utility")

register_benchmark(
    "tofu",
    Benchmark(
        about="fictitious authors (Maini et al., COLM 2024, arXiv 2401.06121)",
        defaults={
            **COMMON_DEFAULTS,
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
        columns=(
            Column("forget quality", "forget_quality", "forget"),
            Column("model utility", "model_utility", "retain_perturbed"),
            *TEXT_COLUMNS,
        ),
        frontiers=(("model utility", "forget quality"), ("retain probability", "forget probability")),
        published=(
            Published(
                "Llama-3.2-1B-Instruct, forget10",
                OPEN_UNLEARNING,
                _TOFU_COLUMNS,
                {
                    "original": (1.66e-21, 0.6),
                    "retrained": (1.0, 0.59),
                    "grad_ascent": (1.06e-239, 0.0),
                    "grad_diff": (1.06e-239, 0.49),
                    "idk": (4.64e-12, 0.23),
                    "npo": (0.02, 0.46),
                    "simnpo": (2.47e-203, 0.54),
                    "rmu": (3.15e-15, 0.59),
                },
            ),
            Published(
                "Llama-3.2-1B-Instruct, forget01",
                OPEN_UNLEARNING,
                _TOFU_COLUMNS,
                {
                    "original": (0.01, 0.6),
                    "retrained": (1.0, 0.6),
                    "grad_ascent": (0.27, 0.33),
                    "grad_diff": (0.77, 0.43),
                    "idk": (0.01, 0.51),
                    "npo": (0.92, 0.56),
                    "simnpo": (0.58, 0.46),
                    "rmu": (0.16, 0.55),
                },
            ),
        ),
    ),
)
