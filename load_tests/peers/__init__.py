"""Peers: other gateways in front of the same vLLM servers. Owner: `throughput`. Blocks.

Each gateway is a process of its own, reached over HTTP.
"""
