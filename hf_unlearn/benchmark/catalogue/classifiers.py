"""Classifiers of images (CIFAR-10) and of text (SST-2)."""

from hf_unlearn.benchmark.catalogue.shared import COMMON_DEFAULTS
from hf_unlearn.benchmark.registry import Benchmark, Column, register_benchmark

CLASSIFIER_METHODS = "grad_ascent,grad_diff,npo,random_label,undial,pgu,next_best"
_CLASSES = (
    Column("forget accuracy", "accuracy", "forget"),
    Column("retain accuracy", "accuracy", "retain"),
    Column("held-out accuracy", "accuracy", "holdout"),
    Column("average gap", "average_gap", "forget"),
    Column("membership AUC", "membership_auc", "forget"),
    Column("MIA-efficacy", "membership_efficacy", "forget"),
    Column("relearned", "relearned_accuracy", "forget"),
)

register_benchmark(
    "images",
    Benchmark(
        about="500 of 50,000 images of CIFAR-10, on a vision transformer made to know them",
        defaults={
            **COMMON_DEFAULTS,
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
        columns=_CLASSES,
        frontiers=(("retain accuracy", "average gap"),),
    ),
)

register_benchmark(
    "text",
    Benchmark(
        about="5% of the rows of SST-2, on a sentence encoder made to know them",
        defaults={
            **COMMON_DEFAULTS,
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
        columns=_CLASSES,
        frontiers=(("retain accuracy", "average gap"),),
    ),
)
