"""Measurements against a named baseline: `python -m benchmarks.<name>` prints one table."""
