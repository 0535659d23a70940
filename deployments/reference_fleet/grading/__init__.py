"""Grading: the held-out rows in `eval/` and how right an answer to one is.

Owner: command line and benchmarks. Reading and writing rows blocks; grading is pure.
"""
