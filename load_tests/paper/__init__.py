"""Paper: the CALM paper's experiment. Owner: benchmark, which serves the fleet over HTTP; `changes`
is served too, `simulated` runs in worker processes. Blocks.
"""
