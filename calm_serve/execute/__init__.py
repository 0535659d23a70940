"""Execute: prefix affinity and queue length choose the replica."""
