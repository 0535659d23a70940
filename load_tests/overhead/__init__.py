"""Latency that our path adds to the same engine asked directly."""
