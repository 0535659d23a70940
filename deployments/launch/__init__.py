"""Before Ray is up: checks, ports, the proxy. Owner: launcher (`deployments.serve`). May block."""
