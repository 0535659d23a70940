"""Overhead: latency that the router adds to the same engine. Owner: benchmark, which serves a
fleet and a vLLM server and loads both over HTTP. Blocks.
"""
