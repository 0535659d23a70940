"""The engine: the only code that imports vLLM. Owner: SLM replica. Blocks at its start only.

Takes OpenAI bodies, gives events and the facts of each request. Starts the engine core as a child
process and writes a sleeping engine's weights to a file without a name.
Public: `Engine`, `EngineDeadError`, `RequestFacts` and `error_body` of `engine`.
"""
