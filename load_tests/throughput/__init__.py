"""Throughput: saturated tokens/s and goodput. Owner: process of the benchmark. Blocks.

Serves a fleet, vLLM servers and gateways, and loads them over HTTP.
"""
