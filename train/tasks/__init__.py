"""Benchmarks: the rows of a run, by split."""
