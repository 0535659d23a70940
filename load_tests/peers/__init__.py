"""Peers: other gateways in front of the same vLLM servers. Owner: the `throughput` benchmark; each
gateway is a process of its own, reached over HTTP. Blocks.
"""
