"""Routing: comparison with other policies. Owner: process of the benchmark. Blocks.

Measures quality, latency and energy; serves the fleet or uses a running one over HTTP.
"""
