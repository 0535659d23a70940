"""Saturated tokens/s and goodput."""
