"""Decision: CPU time of a routing decision. Owner: benchmark, one process, no service. Blocks."""
