"""Deletion requests: from names to a finished folder, one request or a series."""
