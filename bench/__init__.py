"""Benchmarks and experiments; their results are in bench/results/."""
