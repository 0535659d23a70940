"""Routing: quality, latency and energy against other policies. Owner: benchmark, which serves the
fleet or uses a running one over HTTP. Blocks.
"""
