"""SLM deployment: a vLLM engine or a remote upstream. Owner: SLM replica. Blocks in threads only.

Imports nothing of learning or of the knowledge service.
"""
