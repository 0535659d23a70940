"""SLM deployment: an engine or a remote upstream. Owner: SLM replica. Blocks at its start only.

Imports nothing of learning or of the knowledge service.
"""
