"""Constraints: linear maps from a proposed step of a weight to an allowed one."""
