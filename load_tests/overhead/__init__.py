"""Overhead: latency that the router adds. Owner: process of the benchmark. Blocks.

Serves a fleet and a vLLM server with the same engine, and loads both over HTTP.
"""
