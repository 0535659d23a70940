"""Paper: the CALM paper's experiment. Owner: process of the benchmark. Blocks.

Serves the fleet over HTTP, also in `changes`; `simulated` runs in worker processes.
"""
