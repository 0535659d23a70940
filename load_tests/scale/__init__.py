"""Scale: a router process at high load, simulated. Owner: process of the benchmark. Blocks.

Measures cost, state and staleness on simulated time; no service.
"""
