"""Analyze: a request becomes numbers, numbers become predictions."""
