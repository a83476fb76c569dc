"""Data: row formats, encoding, checks, batches, pairs, row identity."""
