"""The decision core on simulated time."""
