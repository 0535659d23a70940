"""SLM deployment: one vLLM engine, or one remote upstream, behind Serve. Owner: SLM replica.

What blocks runs in threads. Imports nothing of learning or of the knowledge service.
"""
