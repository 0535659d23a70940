"""The paper's experiment on simulated time."""
