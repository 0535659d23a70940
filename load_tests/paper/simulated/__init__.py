"""Simulated: the paper's experiment with the real core on simulated time. Owner: worker processes
of the benchmark, one scenario and seed at a time; no service. Blocks.
"""
