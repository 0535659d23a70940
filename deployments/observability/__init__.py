"""Metrics and what shows them. Owner: router and SLM replica. Never blocks."""
