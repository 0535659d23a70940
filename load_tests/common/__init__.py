"""Common: parts that all benchmarks use. Owner: the process of a benchmark. May block.

Load generator, arrivals, the served fleet, workloads and reports.
"""
