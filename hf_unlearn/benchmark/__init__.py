"""Grids of methods, constraints and seeds on the benchmarks of the field."""
