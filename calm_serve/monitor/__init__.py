"""Monitor: windows over what happened, and energy meters."""
