"""Judging a model: the report, the metrics and the attacks."""
