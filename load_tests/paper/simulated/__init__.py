"""Simulated: the experiment on simulated time. Owner: worker processes of `paper`. Blocks.

The real core with simulated engines, one scenario and seed at a time; no service.
"""
