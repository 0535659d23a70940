"""Prefix: the choice of the replica by cached prefixes. Owner: process of the benchmark. Blocks.

Measures cached share and load balance: simulated in its process, then served over HTTP
(`routers` runs in Serve's processes).
"""
