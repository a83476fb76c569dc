"""Demonstrations that run offline on data inside the package and scikit-learn."""
