"""Scores of single rows and the numbers made of them, each with its n and interval."""

from hf_unlearn.evaluation.metrics.intervals import (
    Estimate,
    Undefined,
    bootstrap,
    bootstrap_auc,
    bootstrap_mean,
    undefined,
)
from hf_unlearn.evaluation.metrics.rows import RowScores, map_rows, row_scores, score_classes, score_rows

__all__ = [
    "Estimate",
    "RowScores",
    "Undefined",
    "bootstrap",
    "bootstrap_auc",
    "bootstrap_mean",
    "map_rows",
    "row_scores",
    "score_classes",
    "score_rows",
    "undefined",
]
