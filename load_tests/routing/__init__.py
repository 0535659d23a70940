"""Quality, latency and energy of routing against other policies."""
