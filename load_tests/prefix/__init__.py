"""Prefix: cached share and load balance of the replica choice. Owner: benchmark; simulated in its
process, then served over HTTP (`routers` runs in Serve's processes). Blocks.
"""
