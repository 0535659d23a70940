"""Throughput: saturated tokens/s and goodput. Owner: benchmark, which serves a fleet, vLLM servers
and gateways and loads them over HTTP. Blocks.
"""
