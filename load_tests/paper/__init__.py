"""The CALM paper's experiment, served."""
