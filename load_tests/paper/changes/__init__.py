"""Changes: the served fleet while goals, load, checkpoints, SLMs or feedback change. Owner:
benchmark, over HTTP, Serve's configuration and `calm`. Blocks.
"""
