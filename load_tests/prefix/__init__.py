"""Prefix-cache affinity and load of replica choice."""
