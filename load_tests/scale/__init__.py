"""Scale: cost, state and staleness of a router process on simulated time. Owner: benchmark, one
process, no service. Blocks.
"""
