"""Fleet: quality and cost of every reference model. Owner: process of the benchmark. Blocks.

Serves the fleet or uses a running one over HTTP; `fit_predictor` is a command of its own.
"""
