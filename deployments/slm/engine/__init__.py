"""The engine: the only code that imports vLLM. Owner: SLM replica. What blocks runs in threads."""
