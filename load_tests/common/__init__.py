"""Shared by the benchmarks: load, arrivals, the served fleet, workloads, reports."""
