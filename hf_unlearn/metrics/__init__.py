"""Scores of single rows and the numbers made of them, each with its n and interval."""

from hf_unlearn.metrics.intervals import Estimate, bootstrap_auc, bootstrap_mean
from hf_unlearn.metrics.rows import RowScores, row_scores, score_rows

__all__ = ["Estimate", "RowScores", "bootstrap_auc", "bootstrap_mean", "row_scores", "score_rows"]
