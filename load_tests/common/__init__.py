"""Common: load generator, arrivals, served fleet, workloads and reports of all benchmarks.

Owner: any benchmark's process. May block.
"""
