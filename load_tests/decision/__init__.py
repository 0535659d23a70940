"""What a routing decision costs."""
