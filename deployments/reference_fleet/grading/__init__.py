"""Grading: held-out rows in `eval/` and marks of answers. Owner: command line. May block.

The benchmarks use it too. Reading and writing rows blocks; grading is pure. Public: `rows`,
`marks`, and the command `python -m deployments.reference_fleet.grading.build_rows`.
"""
