"""Retain statistics: second moments of layer inputs and output gradients."""
