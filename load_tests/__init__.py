"""Benchmarks of calm_serve: `python -m load_tests NAME`."""
