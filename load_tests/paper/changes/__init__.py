"""Changes: a served fleet while its conditions change. Owner: process of the benchmark. Blocks.

Goals, load, checkpoints, SLMs and feedback change, over HTTP, Serve's configuration and `calm`.
"""
